"""Which methods stand in which table of a set, and with which seeds."""

from typing import Dict, List, Optional, Sequence

# loss weights that are tried beside the usual one: a third and three times as much, and up to two more where the best
# is at an end
WEIGHTS = dict(
    deeppcb={
        'fitnet': (0.6, 1.7, 15),
        'pkd': (2, 18, 54, 162),
        'cwd': (0.3, 3, 9),
        'mgd': (0.6, 1.7, 15),
        'diffkd': (0.6, 1.7, 15),
        'diffkd, attention': (1.7, 15, 45, 135),
    },
    camvid={
        'dist': (0.1, 0.3, 3),
        'cwd of logits': (0.1, 0.3, 1),
        'fitnet of features': (1.7, 15, 45, 135),
        'pkd of features': (2, 18),
        'pkd of two levels': (0.6, 2, 18, 54),
        'cwd of features': (0.3, 3, 9, 27),
        'mgd of features': (1.7, 15, 45),
        'diffkd': (0.1, 0.3, 3),
        'diffkd of features': (1.7, 15),
    },
)
RECIPES = ['steps=3', 'steps=1', 'backprop_steps=1', 'share_levels', 'latent_channels=32', 'latent_channels=16']
# what was tried with one seed only
TRIED = [
    'plus, loss_weight=15',
    'plus, pkd',
    'plus, four levels',
    'plus and direct pkd',
    'plus and dist of logits',
    'plus and ASPP',
]
GROUPS = dict(
    deeppcb=dict(
        recipes=['alone', 'diffkd', *RECIPES, 'interval=2'],
        parts=[
            'alone',
            'diffkd',
            'gamma=1',
            'gamma=0.9',
            'start_timestep=500',
            'loss_diffusion_weight=0',
            'levels=[0]',
            'levels=[0, 1]',
        ],
        variants=[
            'alone',
            'diffkd',
            'normalised features',
            'GroupNorm',
            'no denoiser gradient',
            'x0 prediction',
            'v prediction',
            'variance preserving',
            'warm-up',
            'diffkd, attention',
        ],
        preset=['alone', 'head', 'cwd, head', 'plus, not denoised', 'diffkd', 'backprop_steps=1', 'plus'],
        detection=[  # with the weights that the validation split chose; DiffKD as published, too
            'alone',
            'fitnet, weight 1.7',
            'pkd, weight 54',
            'cwd, weight 3',
            'mgd, weight 1.7',
            'diffkd',
            'diffkd, weight 1.7',
            'diffkd, attention, weight 45',
            'plus',
        ],
    ),
    camvid=dict(
        tried=['alone', 'diffkd of features', 'plus', 'plus, two levels', 'plus, two levels, pkd', *TRIED],
        segmentation=[
            'alone',
            'dist, weight 0.3',
            'cwd of logits, weight 0.1',
            'fitnet of features, weight 45',
            'pkd of two levels, weight 2',
            'cwd of features, weight 27',
            'mgd of features, weight 15',
            'diffkd',
            'diffkd of features',
            'plus',
        ],
    ),
)
# what a group is compared with beside the student alone; the best of the others is chosen on the validation split
RIVALS = dict(
    recipes='diffkd',
    parts='diffkd',
    variants='diffkd',
    preset='cwd, head',
    detection='cwd, weight 3',
    tried='plus',
    segmentation='pkd of two levels, weight 2',
)
FINAL_SEEDS = dict(detection=5, segmentation=10)  # of the last three; more where the margin is thin
CHOICES = ('weights', 'tried')  # made on the validation split; the other groups report on the test split


def groups_of(name: str) -> List[str]:
    """The groups of a set."""
    return [*GROUPS[name], 'weights']


def methods_of(name: str, group: str) -> List[str]:
    """The methods of a group of a set."""
    if group != 'weights':
        return GROUPS[name][group]
    grid = WEIGHTS[name].items()
    return [method for usual, weights in grid for method in (usual, *(f'{usual}, weight {w:g}' for w in weights))]


def seeds_of(group: str, method: str) -> List[int]:
    """The seeds that a method of a group is trained with."""
    is_final = group in FINAL_SEEDS and method in ('alone', 'plus', RIVALS[group])
    is_tried = method in TRIED or (group == 'variants' and method not in ('alone', 'diffkd'))
    if group == 'weights' or is_tried:
        return [0]
    return list(range(FINAL_SEEDS[group] if is_final else 3))


def cells_of(name: str, group: str, seeds: Optional[Sequence[int]] = None) -> Dict[str, List[int]]:
    """The methods of a group of a set, with their seeds."""
    return {method: list(seeds or seeds_of(group, method)) for method in methods_of(name, group)}
