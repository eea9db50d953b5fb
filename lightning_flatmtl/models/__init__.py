"""Trunks, and ways to share them. A model knows neither aggregators nor sharpness."""

from lightning_flatmtl.models._task_features import TaskFeatures
from lightning_flatmtl.models.attention_picture import attention_picture
from lightning_flatmtl.models.cgc import CGC
from lightning_flatmtl.models.conv_encoder import ConvEncoder
from lightning_flatmtl.models.cross_stitch import CrossStitch
from lightning_flatmtl.models.deeplab_head import DeepLabV3Head
from lightning_flatmtl.models.dense_head import DenseHead, UnitLength
from lightning_flatmtl.models.dilated_resnet import DilatedResNetEncoder
from lightning_flatmtl.models.hierarchical_encoder import HierarchicalEncoder
from lightning_flatmtl.models.lenet_encoder import LeNetEncoder
from lightning_flatmtl.models.mlp_encoder import MLPEncoder
from lightning_flatmtl.models.mmoe import MMoE
from lightning_flatmtl.models.mtan import MTAN, MTANFeatures
from lightning_flatmtl.models.ple import PLE
from lightning_flatmtl.models.recurrent_encoder import RecurrentEncoder
from lightning_flatmtl.models.resnet_encoder import ResNetEncoder
from lightning_flatmtl.models.segnet import SegNet
from lightning_flatmtl.models.sequence_encoder import SequenceEncoder, SequenceFeatures
from lightning_flatmtl.models.sequence_transformer import SequenceTransformer
from lightning_flatmtl.models.soft_sharing import SoftSharing
from lightning_flatmtl.models.table_embedding import TableEmbedding
from lightning_flatmtl.models.task_attention import TaskAttention
from lightning_flatmtl.models.torchvision_encoder import TorchvisionEncoder

__all__ = [
    "CGC",
    "MTAN",
    "PLE",
    "ConvEncoder",
    "CrossStitch",
    "DeepLabV3Head",
    "DenseHead",
    "DilatedResNetEncoder",
    "HierarchicalEncoder",
    "LeNetEncoder",
    "MLPEncoder",
    "MMoE",
    "MTANFeatures",
    "RecurrentEncoder",
    "ResNetEncoder",
    "SegNet",
    "SequenceEncoder",
    "SequenceFeatures",
    "SequenceTransformer",
    "SoftSharing",
    "TableEmbedding",
    "TaskAttention",
    "TaskFeatures",
    "TorchvisionEncoder",
    "UnitLength",
    "attention_picture",
]
