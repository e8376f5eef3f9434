import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.runner import Runner

from tests import tiny


@pytest.fixture
def runner(tmp_path, shapes):
    """Build a run of two iterations."""

    def build(model_cfg=None, resume=False, **hook):
        return Runner.from_cfg(
            tiny.run_cfg(
                model_cfg or tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
                shapes,
                tmp_path / 'run',
                train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_begin=99),
                param_scheduler=[],
                default_hooks__checkpoint=dict(by_epoch=False, interval=1),
                custom_hooks=[dict(type='mmdiffkd.TeacherCheckHook', **hook)],
                resume=resume,
            )
        )

    return build


def evaluate(model_cfg, weights, shapes, work_dir):
    """Return the metrics of a plain test of the teacher."""
    cfg = tiny.run_cfg(model_cfg, shapes, work_dir, load_from=weights)
    return Runner.from_cfg(cfg).test()


def test_metrics_match_a_plain_test_of_the_teacher(runner, tmp_path, shapes):
    run = runner(metric='coco/bbox_mAP_50')
    seen = []
    run.visualizer.add_scalars = lambda values, step, **kwargs: seen.append((values, step))
    run.train()
    expected = evaluate(tiny.detector(base_channels=16), str(tmp_path / 'teacher.pth'), shapes, tmp_path / 'plain_test')
    logged = {key.split('/', 1)[1]: value for key, value in seen[0][0].items()}
    assert seen[0][1] == 0
    assert logged == pytest.approx(expected)
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert f'coco/bbox_mAP_50 {expected["coco/bbox_mAP_50"]:.4f}' in log


def test_low_score_stops_the_run(runner, tmp_path):
    run = runner(min_score=0.3)
    with pytest.raises(ValueError, match=r'reaches coco/bbox_mAP 0\.\d+ on the validation set, below min_score=0.3'):
        run.train()
    assert run.iter == 0


def test_training_does_not_change(runner, tmp_path):
    """The hook does not change the student, the evaluator or the modes of the models."""
    run = runner()
    run.train()
    assert not run.model.diffkd_teacher.model.training
    with_check = torch.load(tmp_path / 'run' / 'iter_2.pth', weights_only=False)['state_dict']
    run = runner()
    run._hooks = [hook for hook in run.hooks if type(hook).__name__ != 'TeacherCheckHook']
    run.train()
    without = torch.load(tmp_path / 'run' / 'iter_2.pth', weights_only=False)['state_dict']
    for key, value in without.items():
        torch.testing.assert_close(with_check[key], value, rtol=0, atol=0, msg=key)


def test_check_is_not_repeated_on_resume(runner, monkeypatch, tmp_path):
    runner().train()
    monkeypatch.setattr(CocoMetric, 'compute_metrics', lambda *args: pytest.fail('evaluated again'))
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(tmp_path / 'run' / 'iter_1.pth'))
    run = runner(resume=True)
    run.train()
    assert run.iter == 2


def test_different_classes(runner, tmp_path):
    teacher = tiny.detector(base_channels=16, **{'bbox_head.num_classes': 200})
    with pytest.raises(ValueError, match='perhaps because it predicts different classes'):
        runner(tiny.distiller_cfg(tmp_path, teacher=teacher)).train()


def test_unknown_metric(runner):
    with pytest.raises(ValueError, match="has no metric 'bbox', only coco/bbox_mAP"):
        runner(metric='bbox').train()


def test_no_op_without_a_teacher(runner, tmp_path):
    run = runner(dict(tiny.distiller_cfg(tmp_path), teacher=None), min_score=0.9)
    run.train()
    assert run.iter == 2
