from .automatic import auto as auto
from .diffusers_unet import DiffusersUNet as DiffusersUNet
from .digits_cnn import DigitsCNN as DigitsCNN
from .digits_cnn import digits_cnn as digits_cnn
from .digits_cnn import load_digits_cnn as load_digits_cnn
from .mlp import MLP as MLP
from .registry import NETWORKS as NETWORKS
from .unet import UNet as UNet
