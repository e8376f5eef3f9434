"""Write logs in the format of mmengine's local backend."""

import json


def write(folder, records, start='20260101_000000', text=''):
    """Write the logs of one start of a run. Return the work dir."""
    data = folder / start / 'vis_data'
    data.mkdir(parents=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (data / 'scalars.json').write_text('\n'.join(lines))
    (data / 'config.py').write_text("model = dict(type='RetinaNet')\n")
    (data.parent / f'{start}.log').write_text(text)
    return folder


def write_test(folder, metrics, start='20260101_000000'):
    """Write the result of ``tools/test.py``, which has no training logs. Return the work dir."""
    data = folder / start / 'vis_data'
    data.mkdir(parents=True)
    (data / 'config.py').write_text("model = dict(type='RetinaNet')\n")
    (data.parent / f'{start}.json').write_text(json.dumps(dict(metrics, time=0.1, data_time=0.1)))
    (data.parent / f'{start}.log').write_text('    Python: 3.11.7\n')
    return folder


def train(iteration, **values):
    return dict(loss=1.0 / iteration, loss_cls=1.0 / iteration, time=0.5, iter=iteration, step=iteration, **values)


def val(step, value):
    return {'coco/bbox_mAP': value, 'data_time': 0.1, 'time': 0.2, 'step': step}
