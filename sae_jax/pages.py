"""HTML and Markdown from templates that lie beside the code."""

import pathlib

import jinja2


def render(template: pathlib.Path, **values) -> str:
    """The page of a jinja2 template; in HTML text is escaped, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=template.suffix == ".html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
