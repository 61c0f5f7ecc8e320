from pathlib import Path

from disagg.cli.documents import configuration_page

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_configuration_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == configuration_page(), "run `make docs`"
