"""A space for `autoretouch sweep`: learning rates and the weight of edited pixels in the pixel loss.

    autoretouch sweep configs/retouch.py --space configs/sweeps/lr.py --trials 20 --workdir runs/sweep \\
        --data.records records --source VALIDATION_BEFORE --target VALIDATION_AFTER

Keys are those of the config, values Optuna's distributions.
"""

from optuna.distributions import CategoricalDistribution, FloatDistribution

space = {
    "optim.generator_lr": FloatDistribution(1e-4, 1e-2, log=True),
    "optim.discriminator_lr": FloatDistribution(1e-5, 5e-4, log=True),
    "loss.edit_weight": CategoricalDistribution([1.0, 2.5, 5.0]),
}
