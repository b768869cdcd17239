"""The page at ``/docs``: the description of the calls as plain HTML that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Schema = Mapping[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin-top: 2rem } code { font-size: 0.95em }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.8rem 0.2rem 0 }
tr + tr { border-top: 1px solid #8884 }
:root { color-scheme: light dark }
"""
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "length at least {}",
    "maxLength": "length at most {}",
    "minItems": "length at least {}",
    "maxItems": "length at most {}",
}


def docs_page(description: Schema) -> str:
    """A page about every call of an OpenAPI description, as ``FastAPI.openapi`` makes it."""
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    schemas = description["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<style>{_STYLE}</style><h1>{title}</h1>",
        "<p>The same for programs: <a href=/openapi.json>/openapi.json</a></p>",
    ]
    for path, call in description["paths"].items():
        for method, operation in call.items():
            parts += _call(f"{method.upper()} {path}", operation)
    parts.append("<h1>Objects</h1>")
    for name, schema in schemas.items():
        parts.append(f"<h2 id={escape(name)}>{escape(name)}</h2>")
        parts.append(_text(schema))
        parts += _fields(schema)
    return "\n".join(parts)


def _call(heading: str, operation: Schema) -> Iterator[str]:
    yield f"<h2><code>{escape(heading)}</code></h2>{_text(operation)}"
    if body := operation.get("requestBody"):
        yield f"<p>Body: {_kind(body['content']['application/json']['schema'])}</p>"
    for parameter in operation.get("parameters", ()):
        name = f"<code>{escape(parameter['name'])}</code>"
        yield f"<p>{name} ({escape(parameter['in'])}): {_kind(parameter['schema'])}</p>"


def _text(described: Schema) -> str:
    return f"<p>{escape(described.get('description', ''))}</p>"


def _fields(schema: Schema) -> Iterator[str]:
    """A table of the fields of an object."""
    required = schema.get("required", ())
    yield "<table><tr><th>field<th>value<th>default"
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else escape(repr(field.get("default")))
        yield f"<tr><td><code>{escape(name)}</code><td>{_kind(field)}<td>{default}"
    yield "</table>"


def _kind(schema: Schema) -> str:
    """What values a schema allows, in words; a null asks for the default and is not named."""
    if ref := schema.get("$ref"):
        name = escape(ref.rpartition("/")[2])
        return f"<a href=#{name}>{name}</a>"
    forms = schema.get("anyOf") or schema.get("oneOf")
    if forms:
        return " or ".join(_kind(form) for form in forms if form.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    kind = escape(str(schema.get("type", "any value")))
    if "items" in schema:
        kind = f"list of {_kind(schema['items'])}"
    bounds = [words.format(_number(schema[key])) for key, words in _BOUNDS.items() if key in schema]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


def _number(value: float) -> float:
    """A bound; FastAPI gives whole numbers as floats, too."""
    return int(value) if value == int(value) else value
