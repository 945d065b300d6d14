"The fused decoder against the plain one, and each function in C against torch."

import math

import pytest
import torch
import torch.nn.functional as F
from lora_folders import *  # noqa: F403
