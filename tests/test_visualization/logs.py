"""Logs as mmengine's local backend writes them."""

import json


def write(folder, records, start='20260101_000000', text=''):
    """Write one start of a run; returns the work dir."""
    data = folder / start / 'vis_data'
    data.mkdir(parents=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (data / 'scalars.json').write_text('\n'.join(lines))
    (data / 'config.py').write_text("model = dict(type='RetinaNet')\n")
    (data.parent / f'{start}.log').write_text(text)
    return folder


def train(iteration, **values):
    return dict(loss=1.0 / iteration, loss_cls=1.0 / iteration, time=0.5, iter=iteration, step=iteration, **values)


def val(step, value):
    return {'coco/bbox_mAP': value, 'data_time': 0.1, 'time': 0.2, 'step': step}
