package runtimes_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/bench/images"
)

// language is what differs between the Runtimes in the tests that all of them have to pass.
type language struct {
	name           string
	handler, event string // of the Function in testdata; no event: the Runtime knows no CloudEvents
	preload        string // of HEARTH_PRELOAD, and there
	random         bool   // the language seeds generators in memory that can be seeded
	failures       []failure
	dir            func(t testing.TB) string // of the Function's files, built if need be
}

// failure is a Function that cannot be loaded, and what the loader has to say about it.
type failure struct {
	name    string
	files   map[string]string
	handler string
	want    []string // parts of error or trace
}

var languages = map[string]language{
	"python": {
		name: "python", handler: "main.hello", event: "main.event", preload: "json,numpy,pandas,flask,requests", random: true,
		dir: testdata("python"),
		failures: []failure{
			{"no code", nil, "main.hello", []string{"ModuleNotFoundError", "main.py"}},
			{"syntax error", map[string]string{"main.py": "def hello(:\n"}, "main.hello", []string{"SyntaxError", `File "/workspace/main.py", line 1`}},
			{"missing module", map[string]string{"main.py": "\nimport nosuchmodule\n"}, "main.hello", []string{"ModuleNotFoundError: No module named 'nosuchmodule'", "line 2"}},
			{"missing function", map[string]string{"main.py": "x = 1\n"}, "main.hello", []string{"AttributeError", "no function 'hello'"}},
			{"no function", map[string]string{"main.py": "hello = 1\n"}, "main.hello", []string{"TypeError", "int"}},
			{"exception", map[string]string{"main.py": "import helper\n", "helper.py": "raise ValueError('the reason')\n"}, "main.hello", []string{"ValueError: the reason", "helper.py"}},
			{"exit", map[string]string{"main.py": "import sys\nsys.exit(3)\n"}, "main.hello", []string{"SystemExit: 3"}},
			{"library's name", map[string]string{"main.py": ""}, "random.random", []string{"ModuleNotFoundError"}},
		},
	},
	"node": {
		name: "node", handler: "index.hello", event: "event", preload: "fs,crypto,express", dir: testdata("node"),
		failures: []failure{
			{"no code", nil, "hello", []string{"Cannot find module '/workspace'"}},
			{"syntax error", map[string]string{"index.js": "function (\n"}, "hello", []string{"SyntaxError", "/workspace/index.js:1"}},
			{"missing module", map[string]string{"index.js": "\nrequire('nosuchmodule')\n"}, "hello", []string{"Error: Cannot find module 'nosuchmodule'", "index.js:2"}},
			{"missing function", map[string]string{"index.js": "exports.other = () => {}\n"}, "hello", []string{"TypeError", `no function "hello"`, "other"}},
			{"no function", map[string]string{"index.js": "exports.hello = 1\n"}, "hello", []string{"TypeError"}},
			{"exception", map[string]string{"index.js": "require('./helper')\n", "helper.js": "throw new RangeError('the reason')\n"}, "hello", []string{"RangeError: the reason", "helper.js:1"}},
			{"exit", map[string]string{"index.js": "process.exit(3)\n"}, "hello", []string{"process.exit(3)"}},
			{"thrown later", map[string]string{"index.mjs": "process.nextTick(() => { throw new Error('the reason') }); await new Promise(() => {})\n", "package.json": `{"main":"index.mjs"}`}, "hello", []string{"the reason"}},
			{"other signature", map[string]string{"index.js": "require('@google-cloud/functions-framework').cloudEvent('hello', () => {})\n"}, "hello", []string{"registered for cloudevent"}},
		},
	},
	"java": {
		name: "java", handler: "Main", event: "Events", preload: "java.net.http.HttpClient,java.security.MessageDigest", random: true,
		dir: javaCode,
		failures: []failure{
			{"no code", nil, "Main", []string{"ClassNotFoundException: Main"}},
			{"no class file", map[string]string{"Main.class": "nonsense"}, "Main", []string{"ClassFormatError"}},
			{"no function", nil, "java.lang.String", []string{"does not implement com.google.cloud.functions.HttpFunction"}},
			{"other signature", nil, "Events", []string{"does not implement com.google.cloud.functions.HttpFunction"}},
			{"initializer", nil, "Broken$Throws", []string{"NumberFormatException", "the reason", "Broken.java"}},
			{"constructor", nil, "Broken$Refuses", []string{"UnsupportedOperationException: the reason", "Broken.java"}},
			{"exit", nil, "Broken$Exits", []string{"System.exit was called"}},
		},
	},
	"native": {
		name: "native", handler: "", dir: func(t testing.TB) string {
			dir, err := compiled()
			if err != nil {
				t.Fatal(err)
			}
			return dir
		},
		failures: []failure{
			{"no code", nil, "", []string{"/workspace/main"}},
			{"outside", nil, "../bin/sh", []string{"not below"}},
			{"no program", map[string]string{"main": "nonsense"}, "", []string{"exec"}},
		},
	},
}

// javaCode compiles the Function in the builder of images, for the Runtime's image has no compiler.
func javaCode(t testing.TB) string {
	t.Helper()
	sources := map[string][]byte{}
	paths, err := filepath.Glob("testdata/java/*.java")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if sources[filepath.Base(path)], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := images.Code(t.Context(), config(), "java", sources)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func testdata(name string) func(testing.TB) string {
	return func(testing.TB) string { return filepath.Join("testdata", name) }
}

// code returns the files of the Function.
func (l language) code(t testing.TB) map[string]string {
	t.Helper()
	files := map[string]string{"data.txt": "data"}
	dir := l.dir(t)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[entry.Name()] = string(text)
	}
	return files
}

// chosen are the Runtimes that are tested. Images of all take ten minutes to build from nothing, more than `make test` may; the two
// by default are the loader in another language and the one in Go.
var chosen = flag.String("runtimes", "python,native", "Runtimes to test, separated by commas: python, node, java, native; their images are built")

// each runs a test for every chosen Runtime for which it is meant.
func each(t *testing.T, meant func(language) bool, test func(t *testing.T, l language)) {
	for name := range strings.SplitSeq(*chosen, ",") {
		l, ok := languages[name]
		if !ok {
			t.Fatalf("-runtimes: there is no Runtime %q", name)
		}
		if meant == nil || meant(l) {
			t.Run(name, func(t *testing.T) { test(t, l) })
		}
	}
}

func TestReady(t *testing.T) {
	each(t, nil, func(t *testing.T, l language) {
		i := boot(t, l.name, "HEARTH_PRELOAD= "+l.preload+", nosuch.library ,")
		c, m := i.connect(t)
		if !strings.HasPrefix(m.Ready.Runtime, l.name+" ") || m.Ready.Loaded {
			t.Errorf("it is %+v", m.Ready)
		}
		if l.preload != "" {
			if !slices.Equal(m.Ready.Preloaded, strings.Split(l.preload, ",")) || len(m.Ready.Missing) != 1 || m.Ready.Missing["nosuch.library"] == "" {
				t.Errorf("preloaded %q, missing %q", m.Ready.Preloaded, m.Ready.Missing)
			}
		}
		if m := c.ask("thawed", map[string]any{"seed": make([]byte, 32), "frozen": 3600.5}); m.Resumed == nil {
			t.Errorf("thawed before anything was loaded: it answers %+v", m)
		}
		// nodeagent comes again.
		_ = c.conn.Close()
		c, m = i.connect(t)
		if m.Ready.Loaded {
			t.Error("it says that it has loaded a Function")
		}
		i.bring(t, l.code(t))
		i.loaded(t, c, c.ask("load", load(l.handler, "http", 1, map[string]string{"GREETING": "all"})))
		i.want(t, "/", http.StatusOK, "hello, all")
	})
}

// TestImports has a Function of each language that can tell say what it has imported.
func TestImports(t *testing.T) {
	type imported struct {
		files   map[string]string
		handler string
		want    map[string]bool // by name: whether it is the image's
		not     []string        // preloaded, the Function's own, or imported by what is told of
	}
	cases := map[string]imported{
		"python": {
			files: map[string]string{
				"main.py":   "import helper, json, brought\nfrom xml.etree import ElementTree\ntry:\n    import nosuch\nexcept ImportError:\n    pass\n\ndef hello(r): return 'hello'\n",
				"helper.py": "import sqlite3\n", "brought/__init__.py": "import colorsys, brought.part\n", "brought/part.py": "x = 1\n", "brought-1.0.dist-info/METADATA": "Name: brought\n",
			},
			handler: "main.hello", want: map[string]bool{"sqlite3": true, "xml.etree": true, "xml.etree.ElementTree": true, "colorsys": true, "brought": false},
			not: []string{"main", "helper", "json", "nosuch", "brought.part", "sqlite3.dbapi2", "xml"},
		},
	}
	each(t, func(l language) bool { return cases[l.name].files != nil }, func(t *testing.T, l language) {
		test := cases[l.name]
		i := boot(t, l.name, "HEARTH_PRELOAD="+l.preload)
		i.bring(t, test.files)
		c, _ := i.connect(t)
		question := load(test.handler, "http", 1, nil)
		question["imports"] = true
		i.loaded(t, c, c.ask("load", question))
		i.want(t, "/", http.StatusOK, "hello")
		m := c.hear()
		if m.Imported == nil {
			t.Fatalf("it says %+v", m)
		}
		got := map[string]bool{}
		for _, module := range m.Imported.Modules {
			got[module.Name] = module.Image
			if module.Seconds < 0 || module.Seconds > patience.Seconds() {
				t.Errorf("%s took %v s", module.Name, module.Seconds)
			}
		}
		for name, image := range test.want {
			if has, ok := got[name]; !ok || has != image {
				t.Errorf("%s: told %v, of the image %v", name, ok, has)
			}
		}
		for _, name := range test.not {
			if _, ok := got[name]; ok {
				t.Errorf("it tells of %s", name)
			}
		}
		if m := c.ask("thawed", map[string]any{"seed": make([]byte, 32), "frozen": 1.5}); m.Resumed == nil {
			t.Errorf("thawed after that: it answers %+v", m)
		}
	})
}

func TestRequests(t *testing.T) {
	each(t, nil, func(t *testing.T, l language) {
		i := boot(t, l.name)
		i.serve(t, l, l.handler, "http", 1, map[string]string{"GREETING": "you", "TZ": "Asia/Tokyo"})
		i.want(t, "/", http.StatusOK, "hello, you")
		i.want(t, "/hour", http.StatusOK, "9")
		i.want(t, "/data", http.StatusOK, "data")
		i.want(t, "/stdin", http.StatusOK, "/dev/null")
		t.Run("request", func(t *testing.T) { describes(t, i) })
		t.Run("bodies", func(t *testing.T) { echoes(t, i) })
		t.Run("streams", func(t *testing.T) { streams(t, i) })
		t.Run("50 at once", func(t *testing.T) { together(t, i) })
		t.Run("failure", func(t *testing.T) {
			status, body := i.get(t, "/fail")
			if status != http.StatusInternalServerError || len(body) > 100 || strings.Contains(body, "the reason") {
				t.Errorf("it answers %d %q, want 500 with a short text that tells nothing", status, body)
			}
			i.err.has(t, "the reason")
			i.want(t, "/", http.StatusOK, "hello, you")
		})
		if l.name != "native" { // whose server is the Function's own
			t.Run("failure in the middle", func(t *testing.T) {
				answer, err := i.request(t, http.MethodGet, "/cut", nil, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer answer.Body.Close()
				if text, err := io.ReadAll(answer.Body); err == nil || string(text) != "first\n" {
					t.Errorf("it answers %q, %v; want an error after the first line, or it passes for the whole", text, err)
				}
			})
			t.Run("hostile", func(t *testing.T) { hostileRequests(t, i) })
		}
		if l.name == "java" {
			t.Run("parts", func(t *testing.T) {
				const body = "--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n" +
					"--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f.txt\"\r\nContent-Type: text/plain\r\n\r\ncontent\r\n--x--\r\n"
				header := map[string]string{"Content-Type": "multipart/form-data; boundary=x"}
				if status, got := i.send(t, http.MethodPost, "/parts", header, body); status != http.StatusOK || got != "f.txt|text/plain|content" {
					t.Errorf("it answers %d %q", status, got)
				}
				for _, cut := range []string{"", body[:20], body[:80], body[:len(body)-30], "--x\r\n\r\n--x", "--x\r\n--x--"} {
					if status, got := i.send(t, http.MethodPost, "/parts", header, cut); status != http.StatusInternalServerError {
						t.Errorf("%q: it answers %d %q", cut, status, got)
					}
				}
			})
		}
		t.Run("lines", func(t *testing.T) { lines(t, i) })
	})
}

// describes checks what a Function is told of a request.
func describes(t *testing.T, i *instance) {
	for _, test := range []struct{ kind, body, field, want string }{
		{"application/json", `{"a":[1,2]}`, "json", `{"a":[1,2]}`},
		{"application/x-www-form-urlencoded", "a=b+c&d=%C3%A9", "form", `{"a":"b c","d":"é"}`},
		{"text/plain", "some text", "text", `"some text"`},
	} {
		header := map[string]string{"Content-Type": test.kind, "X-Test": "a header"}
		answer, err := i.request(t, http.MethodPost, "/request?q=1&q=2&r=%20x", header, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]json.RawMessage
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		want := map[string]string{"method": `"POST"`, "path": `"/request"`, "args": `{"q":["1","2"],"r":[" x"]}`, "header": `"a header"`, test.field: test.want}
		for name, value := range want {
			if !same(got[name], value) {
				t.Errorf("%s: %s is %s, want %s", test.kind, name, got[name], value)
			}
		}
		if answer.StatusCode != http.StatusCreated || answer.Header.Get("X-Answer") != "yes" {
			t.Errorf("it answers %d %v", answer.StatusCode, answer.Header)
		}
	}
}

// same says whether two JSON texts mean the same; a list of one is the same as what is in it, for languages differ there.
func same(got json.RawMessage, want string) bool {
	var a, b any
	if json.Unmarshal(got, &a) != nil || json.Unmarshal([]byte(want), &b) != nil {
		return false
	}
	return fmt.Sprint(flat(a)) == fmt.Sprint(flat(b))
}

func flat(v any) any {
	switch v := v.(type) {
	case []any:
		if len(v) == 1 {
			return flat(v[0])
		}
	case map[string]any:
		for name := range v {
			v[name] = flat(v[name])
		}
	}
	return v
}

func echoes(t *testing.T, i *instance) {
	large := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	for _, test := range []struct {
		name string
		body io.Reader
		want []byte
	}{
		{"empty", bytes.NewReader(nil), nil},
		{"short", bytes.NewReader(large[:10]), large[:10]},
		{"large", bytes.NewReader(large), large},
		{"chunked", io.MultiReader(bytes.NewReader(large)), large},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer, err := i.request(t, http.MethodPost, "/echo", map[string]string{"Content-Type": "application/x-test"}, test.body)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			got, err := io.ReadAll(answer.Body)
			if err != nil || !bytes.Equal(got, test.want) {
				t.Errorf("%d bytes came back, %v; want the same %d", len(got), err, len(test.want))
			}
		})
	}
	t.Run("unread", func(t *testing.T) {
		if status, body := i.send(t, http.MethodPost, "/unread", nil, string(large[:1<<20])); status != http.StatusOK || body != "unread" {
			t.Errorf("it answers %d %q to a body that it does not read", status, body)
		}
		i.want(t, "/", http.StatusOK, "hello, you")
	})
	t.Run("expected", func(t *testing.T) {
		header := map[string]string{"Expect": "100-continue"}
		if status, body := i.send(t, http.MethodPost, "/echo", header, "waited for"); status != http.StatusOK || body != "waited for" {
			t.Errorf("it answers %d %q", status, body)
		}
	})
	t.Run("head", func(t *testing.T) {
		if status, body := i.send(t, http.MethodHead, "/", nil, ""); status != http.StatusOK || body != "" {
			t.Errorf("it answers %d %q", status, body)
		}
	})
}

// streams reads the first half of an answer whose second half waits for another request.
func streams(t *testing.T, i *instance) {
	answer, err := i.request(t, http.MethodGet, "/stream", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	first := make([]byte, len("first\n"))
	if _, err := io.ReadFull(answer.Body, first); err != nil || string(first) != "first\n" {
		t.Fatalf("it begins with %q, %v", first, err)
	}
	if status, _ := i.get(t, "/release"); status != http.StatusNoContent {
		t.Errorf("release answers %d", status)
	}
	if rest, err := io.ReadAll(answer.Body); err != nil || string(rest) != "second\n" {
		t.Errorf("it goes on with %q, %v", rest, err)
	}
}

// together sends requests that are answered only when 50 are under way.
func together(t *testing.T, i *instance) {
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			answer, err := i.request(t, http.MethodGet, "/together", nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer answer.Body.Close()
			if text, err := io.ReadAll(answer.Body); err != nil || string(text) != "together" {
				t.Errorf("it answers %d %q, %v", answer.StatusCode, text, err)
			}
		})
	}
	wg.Wait()
}

// lines has many requests write long lines at once: each comes whole.
func lines(t *testing.T, i *instance) {
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			answer, err := i.request(t, http.MethodGet, fmt.Sprintf("/line?n=%d", n), nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			_ = answer.Body.Close()
		})
	}
	wg.Wait()
	for n := range 50 {
		i.out.has(t, fmt.Sprintf("begin %s %d end\n", strings.Repeat("x", 3000), n))
	}
	for line := range strings.Lines(i.out.String()) {
		if !strings.HasPrefix(line, "begin ") || !strings.HasSuffix(line, " end\n") {
			t.Errorf("a line is not whole: %q", line)
		}
	}
}

// hostileRequests are not HTTP, or are read by others in another way: each is refused or ends the connection, and leaves the
// Function well.
func hostileRequests(t *testing.T, i *instance) {
	for _, text := range []string{
		"nonsense\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 1<<17) + "\r\n",
		"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1", 1<<17),
	} {
		t.Run(fmt.Sprintf("%.40q", text), func(t *testing.T) {
			conn, err := i.network.dial(t.Context(), "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go func() {
				_, _ = io.WriteString(conn, text) // it may be cut off in the middle
			}()
			if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			head := make([]byte, len("HTTP/1.1 4"))
			n, err := io.ReadFull(conn, head)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("it neither answers nor ends the connection")
			}
			if err == nil && string(head) != "HTTP/1.1 4" && string(head) != "HTTP/1.1 5" && string(head) != "HTTP/1.0 4" {
				t.Errorf("it answers %q", head[:n])
			}
		})
	}
	i.want(t, "/", http.StatusOK, "hello, you")
}

func TestFailures(t *testing.T) {
	each(t, nil, func(t *testing.T, l language) {
		for _, f := range l.failures {
			t.Run(f.name, func(t *testing.T) {
				i := boot(t, l.name)
				if i.bring(t, f.files); f.files == nil && f.name != "no code" {
					i.bring(t, l.code(t))
				}
				c, _ := i.connect(t)
				m := c.ask("load", load(f.handler, "http", 1, nil))
				if m.Executing != nil { // and then it could not be executed
					m = c.hear()
				}
				if m.Failed == nil {
					t.Fatalf("it answers %+v", m)
				}
				for _, part := range f.want {
					if !strings.Contains(m.Failed.Error+"\n"+m.Failed.Trace, part) {
						t.Errorf("error %q, trace:\n%s\nwant %q in one of them", m.Failed.Error, m.Failed.Trace, part)
					}
				}
				if m.Failed.Error == "" || strings.Contains(m.Failed.Error, "\n") {
					t.Errorf("error %q, want one line", m.Failed.Error)
				}
				if status := i.wait(t); status != 1 {
					t.Errorf("it ends with status %d, want 1", status)
				}
			})
		}
	})
}

func TestAddressInUse(t *testing.T) {
	each(t, func(l language) bool { return l.name != "native" }, func(t *testing.T, l language) {
		i := boot(t, l.name)
		i.bring(t, l.code(t))
		c, _ := i.connect(t)
		asked := load(l.handler, "http", 1, nil)
		asked["address"] = "192.0.2.1:8080" // nobody's
		if m := c.ask("load", asked); m.Failed == nil || m.Failed.Error == "" {
			t.Errorf("it answers %+v", m)
		}
		if status := i.wait(t); status != 1 {
			t.Errorf("it ends with status %d, want 1", status)
		}
	})
}

func TestCloudEvents(t *testing.T) {
	each(t, func(l language) bool { return l.event != "" }, func(t *testing.T, l language) {
		i := boot(t, l.name)
		i.serve(t, l, l.event, "cloudevent", 1, nil)
		binary := map[string]string{
			"Ce-Specversion": "1.0", "Ce-Id": "1", "Ce-Type": "t", "Ce-Source": "/s", "Ce-Subject": "a%20b", "Content-Type": "application/json",
		}
		structured := map[string]string{"Content-Type": "application/cloudevents+json; charset=utf-8"}
		const event = `{"specversion":"1.0","id":"2","type":"t","source":"/s","subject":"é","datacontenttype":"application/json","data":%s}`
		for _, test := range []struct {
			name   string
			header map[string]string
			body   string
			logs   string
		}{
			{"binary", binary, `{"n":1}`, "event|1|t|/s|a b|"},
			{"structured", structured, fmt.Sprintf(event, `{"n":1}`), "event|2|t|/s|é|"},
			{"base64", structured, `{"specversion":"1.0","id":"3","type":"t","source":"/s","data_base64":"YWJj"}`, "event|3|t|/s|"},
		} {
			t.Run(test.name, func(t *testing.T) {
				if status, body := i.send(t, http.MethodPost, "/", test.header, test.body); status/100 != 2 {
					t.Errorf("it answers %d %q", status, body)
				}
				i.out.has(t, test.logs)
			})
		}
		t.Run("failure", func(t *testing.T) {
			failing := map[string]string{"Ce-Specversion": "1.0", "Ce-Id": "4", "Ce-Type": "t", "Ce-Source": "/s", "Ce-Fail": "yes"}
			if status, body := i.send(t, http.MethodPost, "/", failing, ""); status != http.StatusInternalServerError || strings.Contains(body, "the reason") {
				t.Errorf("it answers %d %q", status, body)
			}
			i.err.has(t, "the reason")
		})
		for name, test := range map[string]struct {
			header map[string]string
			body   string
		}{
			"nothing":       {nil, ""},
			"no id":         {map[string]string{"Ce-Specversion": "1.0", "Ce-Type": "t", "Ce-Source": "/s"}, ""},
			"other version": {map[string]string{"Ce-Specversion": "7", "Ce-Id": "1", "Ce-Type": "t", "Ce-Source": "/s"}, ""},
			"cut":           {structured, `{"specversion":"1.0","id":"2`},
			"no object":     {structured, `[1]`},
			"no text":       {structured, `{"specversion":"1.0","id":{},"type":"t","source":"/s"}`},
			"no base64":     {structured, `{"specversion":"1.0","id":"3","type":"t","source":"/s","data_base64":"***"}`},
			"deep":          {structured, strings.Repeat("[", 1<<17)},
		} {
			t.Run(name, func(t *testing.T) {
				if status, body := i.send(t, http.MethodPost, "/", test.header, test.body); status != http.StatusBadRequest {
					t.Errorf("it answers %d %q, want 400", status, body)
				}
			})
		}
		if status, _ := i.get(t, "/"); status != http.StatusMethodNotAllowed {
			t.Errorf("GET answers %d, want 405", status)
		}
	})
}

// TestThawed makes two Instances that were booted apart alike by their seeds, and then again after a thaw.
func TestThawed(t *testing.T) {
	each(t, func(l language) bool { return l.random }, func(t *testing.T, l language) {
		var drawn [2][3]string
		for n := range drawn {
			i := boot(t, l.name, "HEARTH_PRELOAD="+l.preload)
			c := i.serve(t, l, l.handler, "http", 1, nil)
			_, drawn[n][0] = i.get(t, "/random")
			_, drawn[n][1] = i.get(t, "/random")
			if m := c.ask("thawed", map[string]any{"seed": bytes.Repeat([]byte{2}, 32), "frozen": 3600.5}); m.Resumed == nil {
				t.Fatalf("it answers %+v", m)
			}
			_, drawn[n][2] = i.get(t, "/random")
		}
		if drawn[0] != drawn[1] {
			t.Errorf("the same seeds gave %q and %q", drawn[0], drawn[1])
		}
		if drawn[0][0] == drawn[0][1] || drawn[0][1] == drawn[0][2] || drawn[0][0] == drawn[0][2] {
			t.Errorf("it draws the same again: %q", drawn[0])
		}
	})
}

// TestRequestAfterThaw stops two Instances that draw differently, and tells them of a thaw and sends them a request while they stand
// still. A loader that says to be prompt has taken in the one before it answers the other.
func TestRequestAfterThaw(t *testing.T) {
	each(t, func(l language) bool { return l.random }, func(t *testing.T, l language) {
		var drawn [2]string
		for n := range drawn {
			i := boot(t, l.name, "HEARTH_PRELOAD="+l.preload)
			c := i.serve(t, l, l.handler, "http", byte(n+3), nil)
			if !c.prompt {
				t.Fatal("it does not say that it is prompt")
			}
			if err := i.process.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			c.put("thawed", map[string]any{"seed": bytes.Repeat([]byte{2}, 32), "frozen": 3600.5})
			conn, err := i.network.dial(t.Context(), "tcp", "127.0.0.1:8080")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "GET /random HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if err := i.process.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != http.StatusOK {
				t.Fatalf("status %d, %v", answer.StatusCode, err)
			}
			drawn[n] = string(body)
			if m := c.hear(); m.Resumed == nil {
				t.Errorf("it answers %+v", m)
			}
		}
		if drawn[0] != drawn[1] || drawn[0] == "" {
			t.Errorf("seeded alike they drew %q", drawn)
		}
	})
}

// TestHostileControl says to the loader what nodeagent never would: the connection ends, and the next one finds the loader well.
func TestHostileControl(t *testing.T) {
	each(t, nil, func(t *testing.T, l language) {
		i := boot(t, l.name)
		for name, text := range map[string]string{
			"no JSON":       "nonsense\n",
			"no object":     "[1]\n",
			"nothing known": `{"unload":{}}` + "\n",
			"no text":       `{"load":{"code":1,"address":[],"handler":{}}}` + "\n",
			"deep":          strings.Repeat("[", 1<<17) + "\n",
			"too long":      `{"load":"` + strings.Repeat("x", 1<<20) + "\"}\n",
			"without end":   strings.Repeat(" ", 3<<20),
		} {
			t.Run(name, func(t *testing.T) {
				c, _ := i.connect(t)
				go func() {
					_, _ = io.WriteString(c.conn, text) // it may be cut off in the middle
				}()
				if said := c.over(); len(said) > 0 {
					t.Errorf("it answers %q", said)
				}
			})
		}
		t.Run("cut", func(t *testing.T) {
			c, _ := i.connect(t)
			if _, err := io.WriteString(c.conn, `{"load":{"code":"/works`); err != nil {
				t.Fatal(err)
			}
			_ = c.conn.Close()
		})
		c := i.serve(t, l, l.handler, "http", 1, map[string]string{"GREETING": "you"})
		i.want(t, "/", http.StatusOK, "hello, you")
		if l.name == "native" {
			return
		}
		// It loads once only.
		line, err := json.Marshal(map[string]any{"load": load(l.handler, "http", 1, nil)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.conn.Write(append(line, '\n')); err != nil {
			t.Fatal(err)
		}
		if said := c.over(); len(said) > 0 {
			t.Errorf("it answers %q to a second load", said)
		}
		if _, m := i.connect(t); !m.Ready.Loaded {
			t.Error("it does not say that it has loaded a Function")
		}
		i.want(t, "/", http.StatusOK, "hello, you")
	})
}

func TestTerminate(t *testing.T) {
	each(t, nil, func(t *testing.T, l language) {
		t.Run("waiting", func(t *testing.T) {
			i := boot(t, l.name)
			i.connect(t)
			if err := i.process.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if status := i.wait(t); status != 0 {
				t.Errorf("it ends with status %d", status)
			}
		})
		t.Run("serving", func(t *testing.T) { drains(t, l) })
	})
}

// drains ends an Instance while an answer is under way and an idle connection is open: the answer is whole.
func drains(t *testing.T, l language) {
	i := boot(t, l.name)
	i.serve(t, l, l.handler, "http", 1, nil)
	reader, writer := io.Pipe()
	answered := make(chan string, 1)
	go func() {
		header := map[string]string{"Content-Type": "application/x-test", "Expect": "100-continue"} // the body goes when the Function wants it
		answer, err := i.request(t, http.MethodPost, "/echo", header, reader)
		if err != nil {
			answered <- err.Error()
			return
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		answered <- fmt.Sprint(string(text), err)
	}()
	if _, err := io.WriteString(writer, "before "); err != nil {
		t.Fatal(err)
	}
	i.want(t, "/data", http.StatusOK, "data") // over another connection, which is idle then
	if err := i.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(writer, "after"); err != nil {
		t.Fatal(err)
	}
	_ = writer.Close()
	if got := <-answered; got != "before after<nil>" {
		t.Errorf("the request under way got %q", got)
	}
	if status := i.wait(t); status != 0 {
		t.Errorf("it ends with status %d", status)
	}
}

// compiled builds the native Function once.
var compiled = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(trees.dir, "native-function")
	command := exec.Command("go", "build", "-o", filepath.Join(dir, "main"), "./testdata/native")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, text)
	}
	return dir, nil
})
