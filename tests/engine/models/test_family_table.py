"""docs/families.md: the families of the transformers that it names, as the walk and the schemas have them."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from family_table import whole_block
from shrunk_families import NOT_RUN, families

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "families.md").read_text()
ROWS = {line.split(" | ")[0].strip("| "): line for line in PAGE.splitlines() if line.startswith("| ")}
COLUMNS = [name.strip(" |") for name in ROWS.pop("family").split(" | ")]


def test_the_page_lists_every_family() -> None:
    named = re.search(r"Every family of transformers ([\d.]+)", PAGE)
    assert named is not None
    if named[1] != version("transformers"):
        pytest.skip(f"the page is that of transformers {named[1]}; run tests/support/family_table.py")
    assert list(ROWS) == families()


@pytest.mark.parametrize("family", ROWS)
def test_a_row_says_whether_xpar_has_the_whole_block(family: str) -> None:
    """After a new schema: run tests/support/family_table.py."""
    assert ROWS[family].split(" | ")[COLUMNS.index("whole block")] == whole_block(family)


@pytest.mark.parametrize("family", ROWS)
def test_a_row_says_whether_the_walk_has_the_family(family: str) -> None:
    last = ROWS[family].split(" | ")[-1].rstrip(" |")
    assert last == NOT_RUN[family] if family in NOT_RUN else last.startswith("yes")


def test_models_around_the_text_model_of_a_family_are_families_too() -> None:
    """Whatever transformers generates text with, whose default text model has routed experts."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

    known = set(families())
    maps = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for model_type in {name for mapping in maps for name in mapping}:
        try:
            config = CONFIG_MAPPING[model_type]()
        except (ImportError, ValueError, TypeError):
            continue  # it needs another package, or values that have no default
        inner = model_type_to_module_name(config.get_text_config().model_type)
        assert inner not in known or model_type_to_module_name(model_type) in known, model_type
