"""What a recipe names: network, optimizer, schedule and loss, built in or the user's own.

| file | what lives there |
| --- | --- |
| `models` | `model` -> network: lrd's ResNets, torchvision's, timm's, or the user's own |
| `weights` | `model.weights`: a network starts from the weights in a file |
| `optimizers` | `optimizer`, `lr_dropout` -> torch optimizer with its parameter groups |
| `schedules` | `schedule` -> lr scheduler with a warm-up |
| `losses` | `trainer.loss` -> function of logits and labels |
| `sync_batchnorm` | batch normalization over all ranks on a CPU |

An own part is named `module:attribute`, see `lrd.recipe.named`.
"""
