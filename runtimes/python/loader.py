"""The loader of the python Runtime: boots Python and the libraries that it is told, waits, loads one Function and serves it.

docs/RUNTIMES.md is the contract. The main thread speaks with nodeagent over the control socket; each HTTP connection has the thread
that accepted it. A request goes through a small HTTP/1.1 server of this file into a Flask
application whose only view is the Function."""

import atexit
import base64
import email.utils
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import io
import json
import os
import platform
import random
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse

PROTOCOL = 1
MAX_LINE = 1 << 20  # of the control protocol
MAX_TRACE = 64 << 10
MAX_PARTIAL = 64 << 10  # of a log line that has no end yet
MAX_HEAD = 64 << 10
MAX_CHUNK_LINE = 1 << 10
MAX_UNREAD = 16 << 20  # of a request's body that the Function leaves, read so that the connection can be kept
MAX_CONNECTIONS = 4096
ACCEPTING = 2  # threads that wait for a connection
BLOCK = 64 << 10
TELL_AFTER = 1.0  # seconds without a word of nodeagent's, until it is told what a load has imported
MAX_IMPORTS = 200  # that are told
MAX_IMPORT_NODES = 10_000
LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib")


class Lines(io.TextIOBase):
    """A standard stream that passes on whole lines only, each in one write, whatever thread they come from.

    print writes a line and its end separately, so that lines of several threads would mix."""

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, fd):
        self.fd = fd
        self.buffer = open(fd, "wb", buffering=0, closefd=False)
        self.lock = threading.RLock()  # of what follows; a signal's handler may print while its thread holds it
        self.partial = {}  # by thread

    def write(self, text):
        thread = threading.get_ident()
        with self.lock:
            rest = self.partial.pop(thread, "") + text
            whole = rest.rfind("\n") + 1 if len(rest) < MAX_PARTIAL else len(rest)
            if whole < len(rest):
                self.partial[thread] = rest[whole:]
            self._put(rest[:whole])
        return len(text)

    def _put(self, text):
        data = memoryview(text.encode(self.encoding, self.errors))
        while data:
            data = data[os.write(self.fd, data):]

    def end_line(self):
        """Ends the line that the calling thread has begun, if any."""
        if threading.get_ident() in self.partial:
            self.write("\n")

    def fileno(self):
        return self.fd

    def writable(self):
        return True


def log(message):
    sys.stderr.write(f"hearth: {message}\n")


class Refused(Exception):
    """A request that is answered with an error and the end of its connection; a Function that reads a bad body gets it too."""


class Gone(ConnectionError):
    """The client is gone in the middle of a request or an answer."""


TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*([^\x00\r\n]*?)[ \t]*")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00\r\n]*)?")
DIGITS = re.compile(r"[0-9]{1,18}")
UNSAFE = re.compile(r"[\x00\r\n]")


@functools.lru_cache(maxsize=1024)
def environ_key(name):
    """A header's name in WSGI's environ; None for one that would pass for another there."""
    if b"_" in name:
        return None
    key = name.decode("ascii").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key


@functools.lru_cache(maxsize=1)
def date(second):
    return email.utils.formatdate(second, usegmt=True)


class Body(io.RawIOBase):
    """A request's body as it comes: of known length, or in chunks."""

    def __init__(self, connection, length, expected):
        self.connection = connection
        self.left = length or 0  # of the body, or of the present chunk
        self.chunked = length is None
        self.begun = False  # chunked: there was one
        self.ended = length == 0
        self.expected = expected  # the client waits to be asked for it
        self.faulty = False

    def readable(self):
        return True

    def readinto(self, target):
        if self.ended:
            return 0
        faulty, self.faulty = self.faulty, True  # unless it comes to the end of this
        if faulty:
            raise Refused("400 Bad Request")
        count = self._read(target)
        self.faulty = False
        return count

    def _read(self, target):
        if self.expected:
            self.expected = False
            self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.chunked and self.left == 0 and not self._next_chunk():
            return 0
        count = self.connection.read_into(memoryview(target)[: self.left])
        self.left -= count
        self.ended = not self.chunked and self.left == 0
        return count

    def _next_chunk(self):
        ending = self.connection.read_line(MAX_CHUNK_LINE) if self.begun else b""
        self.begun = True
        size = CHUNK.fullmatch(self.connection.read_line(MAX_CHUNK_LINE))
        if ending or not size:
            raise Refused("400 Bad Request")
        self.left = int(size[1], 16)
        if self.left == 0:
            trailers = 0
            while line := self.connection.read_line(MAX_CHUNK_LINE):
                trailers += len(line)
                if trailers > MAX_HEAD:
                    raise Refused("431 Request Header Fields Too Large")
            self.ended = True
        return self.left > 0

    def finish(self):
        """Reads what was left; false if the connection cannot be used again."""
        if self.expected and not self.ended:
            return False
        scratch, total = bytearray(BLOCK), 0
        while not self.ended and total <= MAX_UNREAD:
            total += self.readinto(scratch)
        return self.ended


class Connection:
    """One client's connection; its thread calls serve."""

    def __init__(self, server, sock, peer):
        self.server, self.sock, self.peer = server, sock, peer
        self.buffer = bytearray()

    def serve(self):
        try:
            while self._one():
                pass
        except Refused as refusal:
            self._refuse(str(refusal))
        except OSError:
            pass  # the client went away: no one to tell
        finally:
            self.server.forget(self)
            self.sock.close()

    def _one(self):
        """Serves a request; false if there is none, or none can follow."""
        head = self._read_head()
        if head is None:
            return False
        self.server.begin(self)
        try:
            self.server.prompt()
            request = Request(self, head)
            answer = Answer(self, request)
            answer.run(self.server.application)
            return answer.keep and not request.body.faulty and request.body.finish()
        finally:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, Lines):
                    stream.end_line()
            self.server.end(self)

    def _read_head(self):
        begin = 0
        while (end := self.buffer.find(b"\r\n\r\n", begin)) < 0:
            if len(self.buffer) > MAX_HEAD:
                raise Refused("431 Request Header Fields Too Large")
            begin = max(0, len(self.buffer) - 3)
            block = self.sock.recv(BLOCK)
            if not block:
                return None
            self.buffer += block
        head = bytes(self.buffer[:end])
        del self.buffer[: end + 4]
        return head

    def read_line(self, limit):
        while (end := self.buffer.find(b"\r\n", 0, limit + 2)) < 0:
            if len(self.buffer) > limit:
                raise Refused("400 Bad Request")
            self.buffer += self._receive()
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        return line

    def read_into(self, target):
        if self.buffer:
            count = min(len(target), len(self.buffer))
            target[:count] = self.buffer[:count]
            del self.buffer[:count]
        else:
            block = self._receive(len(target))
            count = len(block)
            target[:count] = block
        return count

    def _receive(self, limit=BLOCK):
        try:
            block = self.sock.recv(min(limit, BLOCK))
        except OSError as error:
            raise Gone(str(error)) from error
        if not block:
            raise Gone("the request ended early")
        return block

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone(str(error)) from error

    def _refuse(self, status):
        body = status.encode() + b"\n"
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        try:
            self.sock.sendall(head.encode() + body)
            # With what the client still sends unread, closing would take the answer back.
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(1)
            for _ in range(16):
                if not self.sock.recv(BLOCK):
                    break
        except OSError:
            pass


class Request:
    """A request's head, checked, as WSGI's environ."""

    def __init__(self, connection, head):
        line, *fields = head.lstrip(b"\r\n").split(b"\r\n")
        match = REQUEST.fullmatch(line)
        if not match:
            raise Refused("400 Bad Request")
        method, target, minor = match.groups()
        self.http11 = minor == b"1"
        self.head_only = method == b"HEAD"
        headers = self._headers(fields)
        length, expects = self._length(headers), headers.get("HTTP_EXPECT", "").lower() == "100-continue"
        self.body = Body(connection, length, expects and self.http11)
        tokens = [t.strip() for t in headers.get("HTTP_CONNECTION", "").lower().split(",")]
        self.keep = "close" not in tokens if self.http11 else "keep-alive" in tokens
        self.environ = headers
        self._describe(connection, method, target)

    @staticmethod
    def _headers(fields):
        headers = {}
        for field in fields:
            match = FIELD.fullmatch(field)
            if not match:
                raise Refused("400 Bad Request")
            key = environ_key(match[1])
            if key is None:
                continue
            value = match[2].decode("latin-1")
            if key in headers:
                if key in ("CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_HOST"):
                    raise Refused("400 Bad Request")
                value = headers[key] + ("; " if key == "HTTP_COOKIE" else ", ") + value
            headers[key] = value
        return headers

    def _length(self, headers):
        """The body's length, None if it comes in chunks. What two readers could take differently is refused."""
        coding, length = headers.get("HTTP_TRANSFER_ENCODING"), headers.get("CONTENT_LENGTH")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None or not self.http11:
                raise Refused("400 Bad Request")
            return None
        if length is None:
            return 0
        if not DIGITS.fullmatch(length):
            raise Refused("400 Bad Request")
        return int(length)

    def _describe(self, connection, method, target):
        target = target.decode("latin-1")
        path = target
        if not path.startswith("/"):  # OPTIONS *, or the absolute form that proxies are sent
            path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?]*", "", path) if "://" in path else ""
        path, _, query = path.partition("?")
        if "%" in path:
            path = urllib.parse.unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
        self.environ.update({
            "REQUEST_METHOD": method.decode("ascii"),
            "SCRIPT_NAME": "",
            "PATH_INFO": path or "/",
            "QUERY_STRING": query,
            "REQUEST_URI": target,
            "RAW_URI": target,
            "SERVER_NAME": connection.server.host,
            "SERVER_PORT": connection.server.port,
            "SERVER_PROTOCOL": "HTTP/1.1" if self.http11 else "HTTP/1.0",
            "REMOTE_ADDR": connection.peer,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO() if self.body.ended else io.BufferedReader(self.body, BLOCK),
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        })


class Answer:
    """What is said to one request; the head waits for the first block of the body, so that both go in one packet."""

    def __init__(self, connection, request):
        self.connection, self.request = connection, request
        self.keep = request.keep
        self.status = None
        self.headers = []
        self.sent = False  # the head
        self.chunked = False
        self.left = None  # of the length that was told, if one was

    def run(self, application):
        try:
            result = application(self.request.environ, self.start)
            try:
                for block in result:
                    if block:
                        self.write(block)
                self._finish()
            finally:
                if hasattr(result, "close"):
                    result.close()
        except (Gone, Refused):
            if self.sent:
                raise Gone("in the middle of an answer") from None
            raise
        except BaseException:  # SystemExit too: a request must not end what others are served by
            log("a request failed\n" + traceback.format_exc().rstrip())
            if self.sent:
                raise Gone("in the middle of an answer") from None
            raise Refused("500 Internal Server Error") from None

    def start(self, status, headers, exc_info=None):
        if exc_info and self.sent:
            raise exc_info[1].with_traceback(exc_info[2])
        self.status, self.headers = status, headers
        return self.write

    def write(self, block):
        if self.left is not None:
            block = block[: self.left]
            self.left -= len(block)
        head = b"" if self.sent else self._head(None)
        if self.left is not None and head:  # the length is known only since the head was made
            block = block[: self.left]
            self.left -= len(block)
        if self.request.head_only or self._bodiless():
            block = b""
        if self.chunked and block:
            block = b"%x\r\n%b\r\n" % (len(block), block)
        if head or block:
            self.connection.send(head + block if head else block)

    def _finish(self):
        if not self.sent:
            self.connection.send(self._head(0))
        if self.chunked:
            self.connection.send(b"0\r\n\r\n")
        if self.left and not self.request.head_only and not self._bodiless():
            self.keep = False  # the answer is shorter than it said

    def _bodiless(self):
        return self.status[:1] == "1" or self.status[:3] in ("204", "304")

    def _head(self, length):
        """The head as bytes; length is the body's, None if it is not known."""
        self.sent = True
        lines, names = [f"HTTP/1.1 {self.status}"], set()
        for name, value in self.headers:
            if UNSAFE.search(name) or UNSAFE.search(value):
                raise ValueError(f"header {name!r} has a line's end in it")
            lower = name.lower()
            if lower in ("connection", "keep-alive", "transfer-encoding"):
                continue  # how the bytes are carried is this server's matter
            names.add(lower)
            if lower == "content-length":
                self.left = int(value)
            lines.append(f"{name}: {value}")
        if "date" not in names:
            lines.append("Date: " + date(int(time.time())))
        if self.left is None and not self._bodiless():
            if length is not None:
                lines.append(f"Content-Length: {length}")
            elif self.request.http11 and not self.request.head_only:
                self.chunked = True
                lines.append("Transfer-Encoding: chunked")
            else:
                self.keep = False
        if self.connection.server.draining:
            self.keep = False
        if not self.keep:
            lines.append("Connection: close")
        elif not self.request.http11:
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Server:
    """Accepts connections and knows which requests are under way."""

    def __init__(self, application, prompt=lambda: None):
        self.application = application
        self.prompt = prompt  # does, before a request, what nodeagent wants done first
        self.host, self.port = "localhost", "80"
        self.listener = None
        self.draining = False
        self.changed = threading.Condition()  # of what follows
        self.idle, self.busy = set(), set()
        self.accepting = 0  # threads

    def listen(self, address):
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(1024)
        self.host, self.port, self.listener = host, port, listener
        self._accept_more()

    def _accept_more(self):
        """Has as many threads wait for a connection as are to: who accepts one serves it, with no other to be started or woken first."""
        with self.changed:
            missing = 0 if self.draining else ACCEPTING - self.accepting
            self.accepting += missing
        for _ in range(missing):
            threading.Thread(target=self._accept, name="hearth-accept", daemon=True).start()

    def _accept(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(self.idle) + len(self.busy) < MAX_CONNECTIONS)
            try:
                sock, peer = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                if self.draining:
                    return
                log(f"accept: {error}")
                time.sleep(0.01)  # out of descriptors, most likely: others have to end first
                continue
            connection = Connection(self, sock, peer[0])
            with self.changed:
                self.accepting -= 1
                self.idle.add(connection)
                last = self.accepting == 0
            if last:
                self._accept_more()
            connection.serve()
            with self.changed:
                if self.draining or self.accepting >= ACCEPTING:
                    return
                self.accepting += 1

    def attend(self, sock, peer):
        connection = Connection(self, sock, peer)
        with self.changed:
            self.idle.add(connection)
        threading.Thread(target=connection.serve, daemon=True).start()

    def begin(self, connection):
        with self.changed:
            self.idle.discard(connection)
            self.busy.add(connection)

    def end(self, connection):
        with self.changed:
            self.busy.discard(connection)
            self.idle.add(connection)
            if self.draining:
                self._hang_up(connection)
                self.changed.notify_all()

    def forget(self, connection):
        with self.changed:
            self.idle.discard(connection)
            self.busy.discard(connection)
            self.changed.notify_all()

    @staticmethod
    def _hang_up(connection):
        try:  # what has arrived is still read
            connection.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass

    def drain(self):
        """Takes no more connections and returns when all that came is answered."""
        with self.changed:
            self.draining = True
            for connection in self.idle:
                self._hang_up(connection)
        if self.listener:
            try:
                self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            except OSError:
                pass
            self.listener.close()
        with self.changed:
            self.changed.wait_for(lambda: not self.busy and not self.idle)


def web(function, code):
    """The Flask application that calls function with Flask's request for every path and method."""
    import flask
    from werkzeug import exceptions

    class Application(flask.Flask):
        def dispatch_request(self):
            try:
                return function(flask.request._get_current_object())
            except Refused as refusal:  # its body
                return flask.Response(f"{refusal}\n", 400, mimetype="text/plain")

    application = Application("hearth", root_path=code, static_folder=None)

    @application.errorhandler(exceptions.InternalServerError)
    def failed(_):
        return flask.Response("Internal Server Error\n", 500, mimetype="text/plain")

    return application


def events(function):
    """A Function of Flask's requests that calls one of CloudEvents."""
    import flask
    from cloudevents.http import from_http

    def receive(request):
        if request.method != "POST":
            return flask.Response("a CloudEvent comes by POST\n", 405, {"Allow": "POST"}, mimetype="text/plain")
        try:
            event = from_http(request.headers, request.get_data())
        except Exception as error:  # the SDK's own, or that of what stands in for it
            return flask.Response(f"no CloudEvent: {error}\n", 400, mimetype="text/plain")
        function(event)
        return flask.Response("OK", mimetype="text/plain")

    return receive


def warm_up():
    """Sends requests through the whole server and Flask, so that a Function's first one finds nothing to be set up."""
    server = Server(web(lambda request: request.path + request.get_data(as_text=True), "/"))
    for request in (b"GET /warm?a=b HTTP/1.1\r\nHost: warm\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: warm\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"):
        for _ in range(5):
            ours, theirs = socket.socketpair()
            server.attend(theirs, "127.0.0.1")
            ours.sendall(request)
            ours.shutdown(socket.SHUT_WR)
            while ours.recv(BLOCK):
                pass
            ours.close()


def preload(names):
    loaded, missing = [], {}
    for name in filter(None, (n.strip() for n in names.split(","))):
        try:
            importlib.import_module(name)
            loaded.append(name)
        except Stop:
            raise
        except BaseException as error:  # a library may do anything while it is imported
            missing[name] = str(error) or type(error).__name__
    return loaded, missing


def reseed(seed):
    """Seeds the generators that are kept in memory. What secrets and ssl use comes from the kernel."""
    random.seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed([int.from_bytes(seed[i:i + 4], "little") for i in range(0, len(seed), 4)])


def import_function(code, handler):
    module_name, _, name = (handler or "main.main").rpartition(".")
    if not module_name or not name:
        raise ValueError(f"handler {handler!r}: want MODULE.FUNCTION, for example main.main")
    sys.path.insert(0, code)
    if "." in module_name:
        module = importlib.import_module(module_name)
    else:  # found in the code only: a library that is loaded already may have the same name
        spec = importlib.machinery.PathFinder.find_spec(module_name, [code])
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {module_name!r} in {code}: handler {handler!r} wants {module_name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if function is None:
        raise AttributeError(f"module {module_name!r} has no function {name!r}, which the handler {handler!r} names")
    if not callable(function):
        raise TypeError(f"{handler!r} is a {type(function).__name__}, not a function")
    return function


def failure(error):
    """An exception as it is told: the frames of this file and of the import machinery are of no use to anyone."""
    trace = error.__traceback__
    while trace and (trace.tb_frame.f_code.co_filename == __file__ or "importlib" in trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    last = traceback.format_exception_only(type(error), error)[-1].strip()
    text = "".join(traceback.format_exception(type(error), error, trace))
    return {"failed": {"error": last[:MAX_TRACE], "trace": text[-MAX_TRACE:]}}


class Imports:
    """What is imported while a Function is loaded, how long each module takes, and by which it is wanted. It is only noted then; what
    follows from it is found later, off the path.

    Python calls _find_and_load for every module that is not there yet. That is no documented place; where there is none, nothing is told."""

    def __init__(self, code):
        self.code = os.path.join(code, "")
        self.top = []  # nodes: name, seconds, nodes of what it imports
        self.count = 0

    def __enter__(self):
        self.find = find = getattr(importlib._bootstrap, "_find_and_load", None)
        thread, open_nodes = threading.get_ident(), [self.top]

        def note(name, import_):
            if threading.get_ident() != thread or self.count >= MAX_IMPORT_NODES:
                return find(name, import_)
            self.count += 1
            node = [name, 0.0, []]
            open_nodes[-1].append(node)
            open_nodes.append(node[2])
            begun = time.perf_counter()
            try:
                return find(name, import_)
            finally:
                node[1] = time.perf_counter() - begun
                open_nodes.pop()

        # Python leaves out of traces what its import machinery does itself, by the name of its file.
        note.__code__ = note.__code__.replace(co_filename="<frozen importlib._bootstrap>")
        if find is not None:
            importlib._bootstrap._find_and_load = note
        return self

    def __exit__(self, *_):
        if self.find is not None:
            importlib._bootstrap._find_and_load = self.find

    def told(self):
        """The modules that a preload list could name, the dearest first: those of the image that the code imports, each with all that it
        imports itself; and the libraries that came with the code, without those."""
        brought = self._brought()
        found = {}

        def collect(nodes):
            seconds = 0.0  # of what is the image's
            for name, took, inner in nodes:
                place = self._place(name)
                if place == "image":
                    seconds += took
                    self._add(found, name, took, True)
                    continue
                below = collect(inner)
                seconds += below
                if place == "code" and name.partition(".")[0] in brought:
                    self._add(found, name.partition(".")[0], max(0.0, took - below), False)
                    seconds += took - below
            return seconds

        collect(self.top)
        modules = sorted(found.values(), key=lambda module: -module["seconds"])
        return {"imported": {"modules": modules[:MAX_IMPORTS]}}

    @staticmethod
    def _add(found, name, seconds, image):
        module = found.setdefault(name, {"name": name, "seconds": 0.0, "image": image})
        module["seconds"] = round(module["seconds"] + seconds, 6)

    def _place(self, name):
        """Where a module came from: image, code, or None if it did not come to be."""
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is None or spec is None:
            return None
        origin = getattr(spec, "origin", None)
        if not isinstance(origin, str):  # a folder without __init__.py
            origin = next(iter(getattr(module, "__path__", None) or ()), "")
        return "code" if os.path.join(str(origin), "").startswith(self.code) else "image"

    def _brought(self):
        """The names of the top-level modules that pip has put beside the code; the rest is the Function's own."""
        names = set()
        for entry in os.listdir(self.code):
            if not entry.endswith(".dist-info"):
                continue
            names.add(entry.split("-", 1)[0].lower())
            try:
                with open(os.path.join(self.code, entry, "top_level.txt"), encoding="utf-8") as file:
                    names.update(file.read(BLOCK).split())
            except (OSError, ValueError):
                pass
        return names


class Stop(BaseException):
    """SIGTERM came."""


class Malformed(Exception):
    """What came over the control socket is not of the protocol."""


class Conversation:
    """One connection of nodeagent's. What has come is taken in by whoever is first: the thread that waits for it, or one that has a
    request, so that a request finds done what was asked before it came."""

    def __init__(self, connection, respond):
        self.connection, self.respond = connection, respond
        self.lock = threading.Lock()  # of what follows
        self.buffer = bytearray()
        self.later = None  # gives what is to be said when there is nothing else to do

    def run(self):
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        while self.take_in():
            if not poll.poll(self.later and 1000 * TELL_AFTER) and self.later:
                self._say_later()

    def _say_later(self):
        later, self.later = self.later, None
        try:
            message = later()
        except Exception as error:  # what the Function has made of its modules
            log(f"imports: {error}")
            return
        with self.lock:
            self.say(message)

    def say(self, message):
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def take_in(self):
        """Answers all that has come, one object a line; false if the connection has ended."""
        with self.lock:
            while True:
                try:
                    block = self.connection.recv(BLOCK, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return True
                if not block:
                    return False
                self.buffer += block
                while (end := self.buffer.find(b"\n")) >= 0:
                    line = bytes(self.buffer[:end])
                    del self.buffer[: end + 1]
                    self.say(self.respond(message_of(line)))
                if len(self.buffer) > MAX_LINE:
                    raise Malformed("a line of over 1 MiB")

    def prompt(self):
        """take_in for a request, which is not the worse for what nodeagent does."""
        try:
            self.take_in()
        except (Malformed, OSError) as error:
            log(f"control: {error}")
            try:
                self.connection.shutdown(socket.SHUT_RDWR)  # the main thread finds its end
            except OSError:
                pass


class Loader:
    """One Function at most, and what nodeagent asks about it."""

    def __init__(self, preloaded, missing):
        self.preloaded, self.missing = preloaded, missing
        self.server = None
        self.conversation = None

    def run(self, control):
        while True:
            connection, _ = control.accept()
            with connection:
                try:
                    self._converse(connection)
                except (Malformed, OSError) as error:
                    log(f"control: {error}")
                finally:
                    self.conversation = None

    def _converse(self, connection):
        conversation = Conversation(connection, self._respond)
        conversation.say({"ready": {
            "protocol": PROTOCOL, "runtime": "python " + platform.python_version(), "loaded": self.server is not None,
            "prompt": True, "preloaded": self.preloaded, "missing": self.missing}})
        self.conversation = conversation
        conversation.run()

    def _respond(self, message):
        load, thawed = message.get("load"), message.get("thawed")
        if isinstance(load, dict) and self.server is None:
            answer = self._load(load)
            if self.server is None:
                self.conversation.say(answer)
                leave(1)
            return answer
        if isinstance(thawed, dict):
            reseed(seed_of(thawed))
            return {"resumed": {}}
        raise Malformed("neither load, once, nor thawed")

    def _prompt(self):
        conversation = self.conversation
        if conversation:
            conversation.prompt()

    def _load(self, load):
        phases, begun = {}, time.perf_counter()
        try:
            code, handler = text_of(load, "code"), text_of(load, "handler", "")
            signature, address = text_of(load, "signature", "http"), text_of(load, "address")
            if signature not in ("http", "cloudevent"):
                raise ValueError(f"signature {signature!r}: want http or cloudevent")
            environment = load.get("env") or {}
            if not isinstance(environment, dict) or not all(isinstance(v, str) for v in environment.values()):
                raise Malformed("env is no map of strings")
            os.environ.update(environment)
            time.tzset()
            reseed(seed_of(load))
            os.chdir(code)
            with Imports(code) as imports:
                function = import_function(code, handler)
            application = web(events(function) if signature == "cloudevent" else function, code)
            phases["import"] = time.perf_counter() - begun
            begun = time.perf_counter()
            server = Server(application, self._prompt)
            server.listen(address)
            phases["listen"] = time.perf_counter() - begun
        except (Stop, Malformed):
            raise
        except BaseException as error:  # SystemExit too
            return failure(error)
        self.server = server
        if load.get("imports") is True:
            self.conversation.later = imports.told
        return {"loaded": {"phases": phases}}


def text_of(message, name, default=None):
    value = message.get(name) or default
    if not isinstance(value, str):
        raise Malformed(f"{name} is no text")
    return value


def seed_of(message):
    try:
        return base64.b64decode(text_of(message, "seed", ""), validate=True)
    except ValueError as error:
        raise Malformed(f"seed: {error}") from None


def message_of(line):
    if len(line) > MAX_LINE:
        raise Malformed("a line of over 1 MiB")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON: {error}") from None
    if not isinstance(message, dict):
        raise Malformed("no JSON object")
    return message


def leave(status):
    """Ends the process without waiting for threads that the Function has left running."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Lines):
            stream.end_line()
    os._exit(status)


def take_control():
    """Takes the control socket from descriptor 0, where foreign code would find it."""
    control = socket.socket(fileno=os.dup(0))  # which is not inherited
    control.setblocking(True)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return control


def main():
    control = take_control()

    def stop(*_):
        raise Stop

    signal.signal(signal.SIGTERM, stop)
    loader = None
    try:
        sys.stdout, sys.stderr = Lines(1), Lines(2)
        sys.path[0:1] = []  # this file's folder
        sys.path.append(LIBRARY)  # last: what a Function brings itself goes first
        loader = Loader(*preload(os.environ.get("HEARTH_PRELOAD", "")))
        if importlib.util.find_spec("flask"):
            warm_up()
        gc.collect()
        gc.freeze()  # all this stays: no later collection goes through it
        loader.run(control)
    except Stop:
        if loader and loader.server:
            loader.server.drain()
        leave(0)


if __name__ == "__main__":
    main()
