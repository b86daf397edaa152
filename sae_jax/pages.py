"""HTML and Markdown from templates that lie beside the code."""

import pathlib

import jinja2

_HERE = pathlib.Path(__file__).parent


def render(template: pathlib.Path, **values) -> str:
    """Returns the page that a jinja2 template makes of `values`.

    In HTML, text is escaped, and a template may extend base_page.html, which has the head and the
    style that our pages share. A value that the template needs and that is missing is an error of
    jinja2.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=template.suffix == ".html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
