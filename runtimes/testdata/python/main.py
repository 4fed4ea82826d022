"""What the conformance tests ask of a Function, in Python."""

import os
import random
import threading
import time

import flask
import functions_framework

started = time.tzname[0]
barrier, released = threading.Barrier(50), threading.Event()


@functions_framework.http
def hello(request):
    name = request.path.strip("/").replace("/", "_") or "index"
    return globals()["do_" + name](request)


def do_index(request):
    return "hello, " + os.environ.get("GREETING", "nobody")


def do_request(request):
    return {
        "method": request.method, "path": request.path, "args": request.args.to_dict(flat=False),
        "header": request.headers.get("X-Test"), "json": request.get_json(silent=True), "form": request.form.to_dict(),
        "text": request.get_data(as_text=True),
    }, 201, {"X-Answer": "yes"}


def do_echo(request):
    stream = request.stream
    return flask.Response(iter(lambda: stream.read(64 << 10), b""), content_type=request.content_type)


def do_stream(request):
    def blocks():
        yield "first\n"
        released.wait()
        yield "second\n"

    return flask.Response(blocks(), mimetype="text/plain")


def do_release(request):
    released.set()
    return "", 204


def do_together(request):
    barrier.wait()
    return "together"


def do_fail(request):
    raise ValueError("the reason")


def do_cut(request):
    def blocks():
        yield "first\n"
        raise ValueError("the reason")

    return flask.Response(blocks(), mimetype="text/plain")


def do_exit(request):
    raise SystemExit(3)


def do_random(request):
    import numpy

    return f"{random.random()} {numpy.random.random()}"


def do_hour(request):
    return str(time.localtime(0).tm_hour)


def do_data(request):
    with open("data.txt") as file:
        return file.read()


def do_line(request):
    print("begin", "x" * 3000, request.args["n"], "end")
    return ""


def do_unread(request):
    return "unread"


def do_stdin(request):
    return os.readlink("/proc/self/fd/0")


def event(event):
    print("event", event["id"], event["type"], event["source"], event.get("subject"), event.get("none"), event.data, sep="|")
    if event.get("fail"):
        raise ValueError("the reason")
