# DiffKD with the paper's settings, and the same method with parts removed or changed.


def diffkd(levels=None, **neck):
    """Return DiffKD with changes to its neck."""
    return dict(preset='diffkd', distill=dict(fpn=dict(levels=levels, neck=neck)))


def fixed(gamma):
    """Return DiffKD with a constant gamma instead of the noise adapter."""
    return diffkd(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=gamma))


arms = {
    'diffkd': dict(preset='diffkd'),
    'gamma=1': fixed(1.0),
    'gamma=0.9': fixed(0.9),
    'start_timestep=500': diffkd(scheduler=dict(start_timestep=500)),
    'loss_diffusion_weight=0': diffkd(loss_diffusion_weight=0.0),
    'levels=0': diffkd(levels=[0]),
    'levels=0+1': diffkd(levels=[0, 1]),
}
