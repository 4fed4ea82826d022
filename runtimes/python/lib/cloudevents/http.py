"""CloudEvents over HTTP, binary and structured mode, with the names of the CloudEvents SDK for Python."""

import base64
import datetime
import json
import urllib.parse
import uuid

REQUIRED = ("specversion", "id", "source", "type")
STRUCTURED = "application/cloudevents+json"


class CloudEvent:
    """An event: its attributes by name, as a mapping, and its data."""

    def __init__(self, attributes, data=None):
        self._attributes = {k.lower(): v for k, v in attributes.items()}
        self.data = data
        self._attributes.setdefault("specversion", "1.0")
        self._attributes.setdefault("id", str(uuid.uuid4()))
        self._attributes.setdefault("time", datetime.datetime.now(datetime.timezone.utc).isoformat())
        for name in REQUIRED:
            if not self._attributes.get(name):
                raise ValueError(f"attribute {name} is missing")

    def get_attributes(self):
        return dict(self._attributes)

    def get_data(self):
        return self.data

    def __getitem__(self, name):
        return self._attributes[name]

    def get(self, name, default=None):
        return self._attributes.get(name, default)

    def __contains__(self, name):
        return name in self._attributes

    def __iter__(self):
        return iter(self._attributes)

    def __len__(self):
        return len(self._attributes)

    def __eq__(self, other):
        return isinstance(other, CloudEvent) and (self._attributes, self.data) == (other._attributes, other.data)

    def __repr__(self):
        return f"CloudEvent({self._attributes!r}, {self.data!r})"


def from_http(headers, data):
    """The event of an HTTP request; ValueError if there is none in it."""
    headers = {k.lower(): v for k, v in headers.items()}
    kind = headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    data = data.encode() if isinstance(data, str) else data or b""
    if media == STRUCTURED:
        return _structured(data)
    attributes = {k[3:]: urllib.parse.unquote(v) for k, v in headers.items() if k.startswith("ce-")}
    _check(attributes)
    if kind:
        attributes["datacontenttype"] = kind
    return CloudEvent(attributes, _decoded(data, media))


def _structured(data):
    try:
        event = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(event, dict):
        raise ValueError("no JSON object")
    content, encoded = event.pop("data", None), event.pop("data_base64", None)
    if encoded is not None:
        content = base64.b64decode(encoded, validate=True)
    _check(event)
    return CloudEvent({k: v for k, v in event.items() if v is not None}, content)


def _check(attributes):
    for name in REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise ValueError(f"attribute {name} is missing")
    if attributes["specversion"] not in ("1.0", "0.3"):
        raise ValueError(f"specversion {attributes['specversion']!r} is not known")


def _decoded(data, media):
    if not data:
        return None
    if media.endswith("/json") or media.endswith("+json"):
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    return data
