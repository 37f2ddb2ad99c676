"""What an option of several commands says of the template."""

from __future__ import annotations

from softprompt.cli.options import with_line_ends
from softprompt.errors import TemplateError
from softprompt.text.template import Template


def template_from(text: str) -> Template:
    """A user's template, ``\\n`` in it being a line end.

    Raises:
        TemplateError: it breaks the rules, or has no place for a soft prompt.
    """
    template = Template(with_line_ends(text))
    if not template.has_soft_prompt:
        raise TemplateError(
            f"Expected {{soft_prompt}} in the template, found none in {template.text!r}; "
            f"put it where the soft prompt shall stand."
        )
    return template
