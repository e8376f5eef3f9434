import pytest

from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.models.distillers.pairs import read_pairs
from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection
from tests import tiny
from tests.test_upstream import models


def test_default_pair_of_detectors():
    retinanet = tiny.detector()
    pair = read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet)['fpn']
    assert (pair.student, pair.teacher, pair.levels) == ('neck', 'neck', None)
    assert pair.neck == dict(
        type='mmdiffkd.FeatureDiffusionNeck', loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=5.0)
    )


def test_loss_weight_of_reppoints():
    reppoints = dict(type='mmdet.RepPointsDetector', neck=dict(), bbox_head=dict())
    reppoints['neck'] = dict(type='FPN')
    assert read_pairs(None, None, reppoints, reppoints)['fpn'].neck['loss_kd']['loss_weight'] == 15.0


@pytest.mark.parametrize('pair, distance', [('fpn', 'mmdiffkd.MSELoss'), ('cls', 'mmdiffkd.ChannelWiseDivergence')])
def test_loss_weight_without_a_type_keeps_the_default_distance(pair, distance):
    retinanet = tiny.detector()
    distill = {pair: dict(neck=dict(loss_kd=dict(loss_weight=10.0)))}
    pairs = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert pairs[pair].neck['loss_kd'] == dict(type=distance, loss_weight=10.0)


@pytest.mark.parametrize('name', ['cls', 'fpm'])
def test_pair_without_taps_is_refused_with_a_single_default_pair(name):
    """FCOS-like detectors have other default pairs under ``plus``, and names may be misspelled."""
    retinanet = tiny.detector()
    with pytest.raises(ValueError, match=rf'distill.{name} names no tap and is not a default pair \(fpn\)'):
        read_pairs({name: dict()}, build_for_inspection(retinanet), retinanet, retinanet)


def test_explicit_settings_are_kept():
    retinanet = tiny.detector()
    cfg = dict(teacher='backbone.layer4', levels=[2], neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss')))
    pair = read_pairs(dict(mine=cfg), None, retinanet, retinanet)['mine']
    assert pair.student == 'neck' and pair.teacher == 'backbone.layer4' and pair.levels == [2]
    assert pair.neck['loss_kd'] == dict(type='mmdiffkd.PKDLoss')
    assert cfg['neck'] == dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss'))


def test_plus_backpropagates_through_the_last_step():
    retinanet = tiny.detector()
    pairs = read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert pairs['fpn'].neck['num_grad_steps'] == 1
    assert 'num_grad_steps' not in pairs['cls'].neck  # this pair does not denoise
    distill = dict(fpn=dict(neck=dict(num_grad_steps=2)), mine=dict(student='neck', teacher='neck'))
    pairs = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert {name: pair.neck['num_grad_steps'] for name, pair in pairs.items()} == dict(fpn=2, mine=1)


def test_plus_accepts_the_papers_pairs_by_name():
    """The logits of segmentors are not a default pair of ``plus``, but can be named."""
    segmentor = models.convnext_segmentor()
    pairs = read_pairs(dict(logits=dict()), build_for_inspection(segmentor), segmentor, segmentor, preset='plus')
    papers = read_pairs(None, build_for_inspection(segmentor), segmentor, segmentor)['logits']
    assert pairs == dict(logits=papers._replace(neck=dict(papers.neck, num_grad_steps=1)))


def test_plus_compares_scores_without_an_adapter():
    retinanet = tiny.detector()
    distill = dict(cls=dict(neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss'))))
    neck = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')['cls'].neck
    assert neck['align'] is False and neck['loss_kd'] == dict(type='mmdiffkd.PKDLoss')


def test_plus_accepts_a_neck_class():
    retinanet = tiny.detector()
    distill = dict(fpn=dict(neck=dict(type=FeatureDiffusionNeck)))
    pairs = read_pairs(distill, build_for_inspection(retinanet), retinanet, retinanet, preset='plus')
    assert pairs['fpn'].neck['num_grad_steps'] == 1


def test_unknown_preset():
    retinanet = tiny.detector()
    with pytest.raises(ValueError, match="There is no preset='plos'; the nearest are 'plus'"):
        read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='plos')


def test_custom_preset_without_a_required_method():
    @PRESETS.register_module(name='partial', force=True)
    class PartialPreset:
        neck_defaults = {}

        def default_pairs(self, student, student_cfg, teacher_cfg):
            return {}

    retinanet = tiny.detector()
    with pytest.raises(
        ValueError, match="preset='partial': the class PartialPreset has no known_pairs; inherit from Preset"
    ):
        read_pairs(None, build_for_inspection(retinanet), retinanet, retinanet, preset='partial')
    PRESETS.module_dict.pop('partial')


def test_default_pair_is_overridden_by_name():
    classifier = models.resnet_classifier()
    distill = dict(feat=dict(neck=dict(latent_channels=None)), logits={})
    pairs = read_pairs(distill, build_for_inspection(classifier), classifier, classifier)
    default = read_pairs(None, build_for_inspection(classifier), classifier, classifier)
    assert pairs['logits'] == default['logits']
    assert pairs['feat'] == default['feat']._replace(neck=dict(default['feat'].neck, latent_channels=None))
    assert default['feat'].neck['latent_channels'] == 1024


def test_one_tap_of_a_default_pair_is_overridden():
    classifier = models.resnet_classifier()
    cfg = dict(feat=dict(student='backbone.layer4'))
    pair = read_pairs(cfg, build_for_inspection(classifier), classifier, classifier)['feat']
    assert (pair.student, pair.teacher, pair.neck['latent_channels']) == ('backbone.layer4', 'backbone', 1024)


def test_default_pair_without_denoising_has_no_autoencoder():
    classifier = models.resnet_classifier()
    pair = read_pairs(
        dict(feat=dict(neck=dict(denoise=False))), build_for_inspection(classifier), classifier, classifier
    )['feat']
    assert pair.neck == dict(type='mmdiffkd.FeatureDiffusionNeck', denoise=False, loss_kd=dict(type='mmdiffkd.MSELoss'))


def test_pair_without_taps_must_be_a_default_pair():
    classifier = models.resnet_classifier()
    with pytest.raises(ValueError, match=r'distill.mine names no tap and is not a default pair \(feat, logits\)'):
        read_pairs(dict(mine={}), build_for_inspection(classifier), classifier, classifier)


@pytest.mark.parametrize('name', ['neck', 'backbone_feat'])
def test_pair_names_that_match_custom_keys_are_refused(name):
    with pytest.raises(ValueError, match=f"pair name '{name}' contains .*custom_keys"):
        read_pairs({name: dict()}, None, tiny.detector(), tiny.detector())


@pytest.mark.parametrize(
    'pairs, message',
    [
        ({1: tiny.FPN}, 'The pair name 1 cannot be used'),
        ({'fpn': dict(tiny.FPN, loss_weight=2)}, r'neck=dict\(loss_kd=dict\(loss_weight=\.\.\.\)\)'),
        (
            {'fpn': dict(tiny.FPN, loss_kd={})},
            r'distill\.fpn\.loss_kd belongs in the neck: neck=dict\(loss_kd=\.\.\.\)',
        ),
        (
            {'fpn': dict(tiny.FPN, levels=[])},
            r"=\[\] must be an integer, a non-empty list of integers, 'nearest' or None",
        ),
    ],
)
def test_mistakes_in_pairs(pairs, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(pairs, None, {}, {})
