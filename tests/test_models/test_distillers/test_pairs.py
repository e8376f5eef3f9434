import pytest

from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.models.distillers.pairs import read_pairs
from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection
from tests import tiny
from tests.test_upstream import models


def test_detectors_are_distilled_neck_to_neck():
    retinanet = tiny.detector()
    pair = read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet)['fpn']
    assert (pair.student, pair.teacher, pair.levels) == ('neck', 'neck', None)
    assert pair.neck == dict(
        type='mmdiffkd.FeatureDiffusionNeck', loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=5.0)
    )


def test_the_papers_weight_for_reppoints():
    reppoints = dict(type='mmdet.RepPointsDetector', neck=dict(), bbox_head=dict())
    reppoints['neck'] = dict(type='FPN')
    assert read_pairs(None, None, reppoints, reppoints)['fpn'].neck['loss_kd']['loss_weight'] == 15.0


def test_a_pair_keeps_what_it_names():
    retinanet = tiny.detector()
    cfg = dict(teacher='backbone.layer4', levels=[2], neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss')))
    pair = read_pairs(dict(mine=cfg), None, retinanet, retinanet)['mine']
    assert pair.student == 'neck' and pair.teacher == 'backbone.layer4' and pair.levels == [2]
    assert pair.neck['loss_kd'] == dict(type='mmdiffkd.PKDLoss')
    assert cfg['neck'] == dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss'))


def test_plus_sends_the_gradient_through_the_last_step():
    retinanet = tiny.detector()
    pairs = read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert pairs['fpn'].neck['num_grad_steps'] == 1
    assert 'num_grad_steps' not in pairs['cls'].neck  # not denoised
    distill = dict(fpn=dict(neck=dict(num_grad_steps=2)), mine=dict(student='neck', teacher='neck'))
    pairs = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert {name: pair.neck['num_grad_steps'] for name, pair in pairs.items()} == dict(fpn=2, mine=1)


def test_plus_knows_the_papers_pairs_by_name():
    """Of segmentors it leaves out the logits, unless they are asked for."""
    segmentor = models.convnext_segmentor()
    pairs = read_pairs(dict(logits=dict()), build_for_inspection(segmentor), segmentor, segmentor, preset='plus')
    papers = read_pairs(None, build_for_inspection(segmentor), segmentor, segmentor)['logits']
    assert pairs == dict(logits=papers._replace(neck=dict(papers.neck, num_grad_steps=1)))


def test_plus_compares_scores_as_they_are():
    retinanet = tiny.detector()
    distill = dict(cls=dict(neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss'))))
    neck = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')['cls'].neck
    assert neck['align'] is False and neck['loss_kd'] == dict(type='mmdiffkd.PKDLoss')


def test_plus_takes_a_neck_by_its_class_too():
    retinanet = tiny.detector()
    distill = dict(fpn=dict(neck=dict(type=FeatureDiffusionNeck)))
    pairs = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert pairs['fpn'].neck['num_grad_steps'] == 1


def test_unknown_presets():
    retinanet = tiny.detector()
    with pytest.raises(ValueError, match="There is no preset='best'; there are diffkd, plus."):
        read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='best')


def test_a_preset_of_ones_own_that_lacks_a_part():
    @PRESETS.register_module(name='partial', force=True)
    class PartialPreset:
        neck_defaults = {}

        def default_pairs(self, student, student_cfg, teacher_cfg):
            return {}

    retinanet = tiny.detector()
    with pytest.raises(ValueError, match="preset='partial': PartialPreset has no known_pairs; inherit from DiffKD"):
        read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='partial')
    PRESETS.module_dict.pop('partial')


def test_a_default_pair_is_changed_by_its_name():
    classifier = models.resnet_classifier()
    distill = dict(feat=dict(neck=dict(latent_channels=None)), logits={})
    pairs = read_pairs(distill, build_for_inspection(classifier), classifier, classifier)
    default = read_pairs(None, build_for_inspection(classifier), classifier, classifier)
    assert pairs['logits'] == default['logits']
    assert pairs['feat'] == default['feat']._replace(neck=dict(default['feat'].neck, latent_channels=None))
    assert default['feat'].neck['latent_channels'] == 1024


def test_one_tap_of_a_default_pair_is_changed():
    classifier = models.resnet_classifier()
    cfg = dict(feat=dict(student='backbone.layer4'))
    pair = read_pairs(cfg, build_for_inspection(classifier), classifier, classifier)['feat']
    assert (pair.student, pair.teacher, pair.neck['latent_channels']) == ('backbone.layer4', 'backbone', 1024)


def test_a_default_pair_without_denoising_has_no_autoencoder():
    classifier = models.resnet_classifier()
    pair = read_pairs(
        dict(feat=dict(neck=dict(denoise=False))), build_for_inspection(classifier), classifier, classifier
    )['feat']
    assert pair.neck == dict(type='mmdiffkd.FeatureDiffusionNeck', denoise=False, loss_kd=dict(type='mmdiffkd.MSELoss'))


def test_a_pair_without_taps_has_to_be_a_default_one():
    classifier = models.resnet_classifier()
    with pytest.raises(ValueError, match=r'distill.mine names no tap and is not a default pair \(feat, logits\)'):
        read_pairs(dict(mine={}), build_for_inspection(classifier), classifier, classifier)


@pytest.mark.parametrize('name', ['neck', 'backbone_feat'])
def test_names_that_optimizer_settings_would_catch(name):
    with pytest.raises(ValueError, match=f"pair name '{name}' contains .*custom_keys"):
        read_pairs({name: dict()}, None, tiny.detector(), tiny.detector())
