"""Small models of timm, torchvision and transformers with random weights, as teachers."""

import json

import pytest
import torch


def timm_teacher(folder, name='test_vit'):
    timm = pytest.importorskip('timm')
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), folder / f'{name}.pth')
    return dict(config=f'timm::{name}', checkpoint=str(folder / f'{name}.pth')), model


def torchvision_teacher(folder, name='shufflenet_v2_x0_5'):
    from torchvision.models import get_model

    torch.manual_seed(1)
    model = get_model(name, weights=None).eval()
    torch.save(model.state_dict(), folder / f'{name}.pth')
    return dict(config=f'torchvision::{name}', checkpoint=str(folder / f'{name}.pth')), model


def transformers_teacher(folder, kind='Dinov2', with_processor=True, **options):
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    options = {**sizes, 'patch_size': 14, 'image_size': 56, **options}
    torch.manual_seed(1)
    config = getattr(transformers, f'{kind}Config')(**options)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(folder / kind)
    if with_processor:
        processor = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1], rescale_factor=1 / 255)
        (folder / kind / 'preprocessor_config.json').write_text(json.dumps(processor))
    return dict(config=f'transformers::{folder / kind}', checkpoint='pretrained'), model


TEACHERS = dict(timm=timm_teacher, torchvision=torchvision_teacher, transformers=transformers_teacher)
