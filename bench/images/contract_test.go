package images_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// TestContract starts the function of an image in its own tree and holds it to the contract of all functions. The images
// named in HEARTH_TEST_IMAGES, with the cache in HEARTH_CACHE, are tested; unset, it is only the one that builds in seconds.
func TestContract(t *testing.T) {
	cache, names := os.Getenv("HEARTH_CACHE"), strings.Fields(os.Getenv("HEARTH_TEST_IMAGES"))
	if len(names) == 0 {
		cache, names = t.TempDir(), []string{"go"}
	}
	for _, image := range names {
		t.Run(image, func(t *testing.T) {
			f := start(t, build(t, cache, image))
			t.Run("describe", func(t *testing.T) { describes(t, f, image) })
			if image == "flask" || image == "large-java" {
				t.Run("unknown", func(t *testing.T) { unknown(t, f) })
				t.Run("stop", func(t *testing.T) { stops(t, f) })
				return
			}
			t.Run("echo", func(t *testing.T) { echoes(t, f) })
			t.Run("sleep", func(t *testing.T) { sleeps(t, f) })
			t.Run("env", func(t *testing.T) {
				f.want(t, "/env?name=GREETING", http.StatusOK, "hello, world")
				f.want(t, "/env?name=NO_SUCH_NAME", http.StatusOK, "")
			})
			t.Run("log", func(t *testing.T) {
				f.want(t, "/log?line=one%20line", http.StatusNoContent, "")
				if line := f.line(t); line != "one line" {
					t.Errorf("it logged %q", line)
				}
			})
			t.Run("unknown", func(t *testing.T) { unknown(t, f) })
			t.Run("stop", func(t *testing.T) { drains(t, f) })
		})
	}
}

// function is a started one. Its client keeps connections open, as the gateway does.
type function struct {
	process *exec.Cmd
	url     string
	lines   *bufio.Scanner
	client  *http.Client
}

func start(t *testing.T, layoutPath string) *function {
	t.Helper()
	image := load(t, layoutPath)
	root := t.TempDir()
	flat := mutate.Extract(image)
	defer flat.Close()
	unpack := exec.CommandContext(t.Context(), "tar", "-xC", root)
	unpack.Stdin = flat
	if text, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v\n%s", err, text)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	// Java finds its libraries through /proc. The mount is in a namespace of the process and ends with it.
	const enter = `mkdir -p "$1/proc"; mount -t proc proc "$1/proc"; exec chroot "$@"`
	output, input, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	f := &function{
		process: &exec.Cmd{
			Path:   "/bin/sh",
			Args:   append([]string{"sh", "-euc", enter, "sh", root}, config.Config.Cmd...),
			Env:    append(config.Config.Env, "GREETING=hello, world", "PORT="+strconv.Itoa(port)),
			Stdout: input, Stderr: os.Stderr,
			SysProcAttr: &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL},
		},
		url:    fmt.Sprintf("http://127.0.0.1:%d", port),
		lines:  bufio.NewScanner(output),
		client: &http.Client{Transport: &http.Transport{}},
	}
	if err := f.process.Start(); err != nil {
		t.Fatal(err)
	}
	_ = input.Close()
	t.Cleanup(func() {
		_ = f.process.Process.Kill()
		_, _ = f.process.Process.Wait()
		_ = output.Close()
		f.client.CloseIdleConnections()
	})
	if line := f.line(t); !strings.Contains(line, strconv.Itoa(port)) {
		t.Fatalf("its first line is %q, want one that tells the port %d", line, port)
	}
	return f
}

func freePort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

func (f *function) line(t *testing.T) string {
	t.Helper()
	if !f.lines.Scan() {
		t.Fatalf("it ended its output: %v", f.lines.Err())
	}
	return f.lines.Text()
}

func (f *function) get(t *testing.T, path string) (status int, body string) {
	t.Helper()
	response, err := f.client.Get(f.url + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

func (f *function) want(t *testing.T, path string, status int, body string) {
	t.Helper()
	if gotStatus, gotBody := f.get(t, path); gotStatus != status || gotBody != body {
		t.Errorf("%s: %d %q, want %d %q", path, gotStatus, gotBody, status, body)
	}
}

func describes(t *testing.T, f *function, image string) {
	_, body := f.get(t, "/")
	var got struct{ Runtime, Version string }
	if err := json.Unmarshal([]byte(body), &got); err != nil || got.Runtime != image || got.Version == "" {
		t.Errorf("it says %q, %v", body, err)
	}
}

func unknown(t *testing.T, f *function) {
	if status, _ := f.get(t, "/no/such/path"); status != http.StatusNotFound {
		t.Errorf("status %d, want 404", status)
	}
}

func stops(t *testing.T, f *function) {
	if err := f.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if state, err := f.process.Process.Wait(); err != nil || !state.Success() {
		t.Errorf("it ended with %v, %v", state, err)
	}
}

func echoes(t *testing.T, f *function) {
	long := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB: more than any buffer between
	for _, test := range []struct {
		name string
		body io.Reader
		want []byte
	}{
		{"empty", bytes.NewReader(nil), nil},
		{"short", bytes.NewReader(long[:10]), long[:10]},
		{"long", bytes.NewReader(long), long},
		{"chunked", io.MultiReader(bytes.NewReader(long)), long},
	} {
		t.Run(test.name, func(t *testing.T) {
			response, err := f.client.Post(f.url+"/echo", "application/x-test", test.body)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			got, err := io.ReadAll(response.Body)
			if err != nil || !bytes.Equal(got, test.want) {
				t.Errorf("%d bytes came back, %v; want the same %d", len(got), err, len(test.want))
			}
			if kind := response.Header.Get("Content-Type"); kind != "application/x-test" {
				t.Errorf("content type %q", kind)
			}
		})
	}
}

func sleeps(t *testing.T, f *function) {
	f.want(t, "/sleep?ms=1", http.StatusOK, "1\n")
	for _, ms := range []string{"", "-1", "soon", "99999999999999999999"} {
		if status, _ := f.get(t, "/sleep?ms="+ms); status != http.StatusBadRequest {
			t.Errorf("ms=%q: status %d, want 400", ms, status)
		}
	}
}

// drains sends SIGTERM while a request is under way and an idle connection is open: the request is answered and the
// process ends with status 0.
func drains(t *testing.T, f *function) {
	reader, writer := io.Pipe()
	type answer struct {
		body []byte
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		response, err := f.client.Post(f.url+"/echo", "text/plain", reader)
		if err != nil {
			answered <- answer{err: err}
			return
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		answered <- answer{body: text, err: err}
	}()
	if _, err := io.WriteString(writer, "before "); err != nil {
		t.Fatal(err)
	}
	f.want(t, "/env?name=GREETING", http.StatusOK, "hello, world") // so that the request before it has arrived too
	if err := f.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(writer, "after"); err != nil {
		t.Fatal(err)
	}
	_ = writer.Close()
	if got := <-answered; got.err != nil || string(got.body) != "before after" {
		t.Errorf("the request under way got %q, %v", got.body, got.err)
	}
	if state, err := f.process.Process.Wait(); err != nil || !state.Success() {
		t.Errorf("it ended with %v, %v", state, err)
	}
}
