"""The known model families and the layers that they describe.

A family is one :class:`~xpar.engine.architectures.schema.Architecture` in the file of its ``model_type``. A
new family is a new file and an entry of ``ARCHITECTURES``, because no code asks for a family by its name.

Letters in shapes: T tokens, H hidden size, I width of an expert, E experts, k experts per token, L latent
size.
"""

from xpar.engine.architectures.cohere2_moe import COHERE2_MOE
from xpar.engine.architectures.dbrx import DBRX
from xpar.engine.architectures.deepseek_v2 import DEEPSEEK_V2
from xpar.engine.architectures.deepseek_v3 import DEEPSEEK_V3
from xpar.engine.architectures.deepseek_v4 import DEEPSEEK_V4
from xpar.engine.architectures.dots1 import DOTS1
from xpar.engine.architectures.ernie4_5_moe import ERNIE4_5_MOE
from xpar.engine.architectures.gemma4 import GEMMA4, GEMMA4_TEXT
from xpar.engine.architectures.glm4_moe import GLM4_MOE
from xpar.engine.architectures.gpt_oss import GPT_OSS
from xpar.engine.architectures.granitemoe import GRANITEMOE, GRANITEMOESHARED
from xpar.engine.architectures.hunyuan_v1_moe import HUNYUAN_V1_MOE
from xpar.engine.architectures.jamba import JAMBA
from xpar.engine.architectures.jetmoe import JETMOE
from xpar.engine.architectures.llama4 import LLAMA4, LLAMA4_TEXT
from xpar.engine.architectures.longcat_flash import LONGCAT_FLASH
from xpar.engine.architectures.minimax_m2 import MINIMAX_M2
from xpar.engine.architectures.mixtral import MIXTRAL
from xpar.engine.architectures.nemotron_h import NEMOTRON_H
from xpar.engine.architectures.olmoe import OLMOE
from xpar.engine.architectures.phimoe import PHIMOE
from xpar.engine.architectures.qwen2_moe import QWEN2_MOE
from xpar.engine.architectures.qwen3_moe import QWEN3_MOE
from xpar.engine.architectures.qwen3_next import QWEN3_NEXT

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
    LLAMA4_TEXT,
    LLAMA4,
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
"""Every known family, in the order in which messages list them."""
