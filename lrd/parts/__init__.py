"""What a recipe names: network, optimizer, schedule and loss, built in or the user's own.

| file | what lives there |
| --- | --- |
| `models` | `model` -> network: lrd's ResNets, torchvision's, timm's, or the user's own |
| `resnet` | lrd's ResNets, for small images |
| `random_layers` | seeds from positions for layers that draw from a global generator |
| `weights` | `model.weights`: a network starts from the weights in a file |
| `optimizers` | `optimizer`, `lr_dropout` -> torch optimizer with its parameter groups |
| `argument_types` | types of the arguments of torch's optimizers |
| `schedules` | `schedule` -> lr at each step, with a warm-up; trajectories without training |
| `schedulers` | `schedule` -> torch's scheduler, or the user's own |
| `checks` | optimizers and schedules are tried out before training |
| `losses` | `trainer.loss` -> function of logits and labels |
| `sync_batchnorm` | batch normalization over all ranks on a CPU |

An own part is named `module:attribute`, see `lrd.recipe.named`.
"""
