"""Student and teacher of a run in a few words. Its config is read as text: one from elsewhere could run code."""

import ast
from pathlib import PurePosixPath
from typing import Optional, Tuple


def models_of(config: str) -> Tuple[str, str]:
    """Describe the models of a config.

    Args:
        config (str): Text of a config as mmengine dumps it.

    Returns:
        tuple[str, str]: What is trained, and the teacher; empty where the config does not say.
    """
    model = _setting(config, 'model')
    if not isinstance(model, dict):
        return '', ''
    teacher = model.get('teacher')
    if 'student' not in model or not isinstance(teacher, dict):
        return _architecture(model), ''
    source = teacher.get('config')
    described = PurePosixPath(source).stem if isinstance(source, str) else _architecture(source)
    return _architecture(model['student']), described


def _setting(config: str, name: str):
    """The value of a setting, as far as it is written in literals and ``dict(...)``."""
    try:
        body = ast.parse(config).body
    except (SyntaxError, ValueError):  # a damaged file
        return None
    for node in body:
        if isinstance(node, ast.Assign) and [getattr(target, 'id', None) for target in node.targets] == [name]:
            return _value(node.value)
    return None


def _value(node: ast.expr):
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _architecture(model: Optional[dict]) -> str:
    """Such as ``RetinaNet, ResNet-18``."""
    if isinstance(model, dict) and 'type' not in model and isinstance(model.get('model'), dict):
        model = model['model']  # a teacher's whole config
    if not isinstance(model, dict):
        return ''
    parts = [_type(model)]
    backbone = model.get('backbone')
    if isinstance(backbone, dict):
        size = next((str(backbone[key]) for key in ('depth', 'arch') if isinstance(backbone.get(key), (int, str))), '')
        parts.append('-'.join(filter(None, [_type(backbone), size])))
        if isinstance(backbone.get('base_channels'), int):
            parts.append(f'{backbone["base_channels"]} channels')
    return ', '.join(filter(None, parts))


def _type(cfg: dict) -> str:
    return str(cfg.get('type') or '').rsplit('.', 1)[-1]
