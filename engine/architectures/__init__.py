"""The known model families.

A family is one :class:`~xpar.engine.architectures.schema.Architecture` value; nothing asks for a family by name, so a new family is
a new value.
"""

from xpar.engine.architectures.deepseek import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DOTS1,
    GLM4_MOE,
    NEMOTRON_H,
)
from xpar.engine.architectures.gemma import GEMMA4, GEMMA4_TEXT
from xpar.engine.architectures.nested import LLAMA4_VISION
from xpar.engine.architectures.qwen import OLMOE, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT
from xpar.engine.architectures.single import (
    COHERE2_MOE,
    ERNIE4_5_MOE,
    HUNYUAN_V1_MOE,
    JAMBA,
    LONGCAT_FLASH,
    MINIMAX_M2,
    MIXTRAL,
    PHIMOE,
)
from xpar.engine.architectures.stacked import DBRX, GPT_OSS, GRANITEMOE, GRANITEMOESHARED, JETMOE, LLAMA4

ARCHITECTURES = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    GPT_OSS,
    GLM4_MOE,
    GRANITEMOE,
    GRANITEMOESHARED,
    LLAMA4,
    LLAMA4_VISION,
    MINIMAX_M2,
    ERNIE4_5_MOE,
    PHIMOE,
    DOTS1,
    QWEN3_NEXT,
    HUNYUAN_V1_MOE,
    JAMBA,
    LONGCAT_FLASH,
    NEMOTRON_H,
    DBRX,
    JETMOE,
    COHERE2_MOE,
    GEMMA4_TEXT,
    GEMMA4,
)
