"""Groups of methods and the seeds of their runs. Each group is a table of a data set."""

from typing import Dict, List, Optional, Sequence

# Loss weights to compare with the default. Most methods try a third and three times the default. If the best weight is
# the smallest or the largest one, up to two further weights extend the range.
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
        'diffkd': (0.03, 0.1, 0.3, 3),
        'diffkd of features': (1.7, 15),
    },
)
RECIPES = ['steps=3', 'steps=1', 'num_grad_steps=1', 'share_levels', 'latent_channels=32', 'latent_channels=16']
VARIANTS_WITH_ONE_SEED = [
    'normalised features',
    'GroupNorm',
    'x0 prediction',
    'v prediction',
    'variance preserving',
    'diffkd, attention',
]
TRIED_WITH_ONE_SEED = [
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
        variants=['alone', 'diffkd', 'no denoiser gradient', 'warm-up', *VARIANTS_WITH_ONE_SEED],
        preset=['alone', 'head', 'cwd, head', 'plus, not denoised', 'diffkd', 'num_grad_steps=1', 'plus'],
        detection=[  # methods with the loss weights chosen on the validation split, and DiffKD as published
            'alone',
            'fitnet, weight 1.7',
            'pkd, weight 54',
            'cwd, weight 3',
            'cwd, head',
            'mgd, weight 1.7',
            'diffkd',
            'diffkd, weight 1.7',
            'diffkd, attention, weight 45',
            'plus',
        ],
    ),
    camvid=dict(
        tried=[
            'alone',
            'diffkd of features',
            'plus',
            'plus, two levels',
            'plus, two levels, pkd',
            *TRIED_WITH_ONE_SEED,
        ],
        preset=['alone', 'diffkd', 'diffkd of features', 'features, not denoised', 'plus'],
        segmentation=[  # weights chosen on the validation split; over three seeds, PKD's defaults are as good
            'alone',
            'dist, weight 0.3',
            'cwd of logits, weight 0.1',
            'fitnet of features, weight 45',
            'pkd of features',
            'pkd of two levels',
            'pkd of two levels, weight 2',
            'cwd of features, weight 27',
            'mgd of features, weight 15',
            'diffkd',
            'diffkd, weight 0.1',
            'diffkd of features',
            'plus',
        ],
    ),
    **{
        # training three times as long shows whether the gains of a short training persist
        'deeppcb-longer': dict(preset=['alone', 'cwd, head', 'plus']),
        'camvid-longer': dict(preset=['alone', 'pkd of two levels', 'plus']),
    },
)
# Second baseline of each group, besides the student alone: DiffKD as published, the preset whose parts the group
# compares, or the best method without denoising on the validation split.
BASELINES = dict(
    recipes='diffkd',
    parts='diffkd',
    variants='diffkd',
    preset='plus',
    detection='cwd, head',
    tried='plus',
    segmentation='pkd of two levels',
)
# Number of seeds of the methods that do not have three: up to ten if the difference to a baseline is small, and one for
# changes that were tried only once.
SEEDS = dict(
    detection=dict.fromkeys(['alone', 'cwd, weight 3', 'cwd, head', 'plus'], 5),
    segmentation={'alone': 5, 'pkd of two levels': 10, 'pkd of two levels, weight 2': 5, 'plus': 10},
    variants=dict.fromkeys(VARIANTS_WITH_ONE_SEED, 1),
    tried=dict.fromkeys(TRIED_WITH_ONE_SEED, 1),
)
# Groups that report results on the validation split, because settings are chosen from them. All other groups report
# results on the test split.
CHOICES = ('weights', 'tried', 'variants')


def base_of(name: str) -> str:
    """Remove ``-longer`` from a name: a longer training shares the images, teacher and losses of its data set."""
    return name.removesuffix('-longer')


def groups_of(name: str) -> List[str]:
    """Return the groups of a data set."""
    return [*GROUPS[name], *(['weights'] if name in WEIGHTS else [])]


def methods_of(name: str, group: str) -> List[str]:
    """Return the methods of a group."""
    if group != 'weights':
        return GROUPS[name][group]
    grid = WEIGHTS[name].items()
    return [method for base, weights in grid for method in (base, *(f'{base}, weight {w:g}' for w in weights))]


def seeds_of(group: str, method: str) -> List[int]:
    """Return the seeds that a method of a group is trained with."""
    return [0] if group == 'weights' else list(range(SEEDS.get(group, {}).get(method, 3)))


def runs_of(name: str, group: str, seeds: Optional[Sequence[int]] = None) -> Dict[str, List[int]]:
    """Return the seeds of each method of a group. If ``seeds`` are given, all methods have these seeds."""
    return {method: list(seeds or seeds_of(group, method)) for method in methods_of(name, group)}
