package cli_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/cli"
)

// want runs a command and checks its exit code and what its output, both kinds together, contains.
func (f *fake) want(t *testing.T, code int, contains string, args ...string) string {
	t.Helper()
	got, out, errs := f.exec(t, "from standard input", args...)
	if got != code || !strings.Contains(out+errs, contains) {
		t.Errorf("%q: exit code %d, want %d and %q; out %q, err %q", args, got, code, contains, out, errs)
	}
	return out
}

func TestDeployPrintsTheURLAlone(t *testing.T) {
	f := newFake(t)
	out := f.want(t, 0, "hello-00001", "deploy", "hello", "--image", "reg/hello:1")
	if !strings.HasPrefix(out, "http://127.0.0.1:") || !strings.HasSuffix(out, "/fn/hello\n") {
		t.Errorf("prints %q", out)
	}
	f.want(t, 2, "come after --", "deploy", "hello", "--image", "reg/hello:1", "fast")
	f.want(t, 2, "code writes to /tmp", "deploy", "hello", ".", "--writable-root")
}

func TestDeploySpec(t *testing.T) {
	f := newFake(t)
	got, _, errs := f.exec(t, "", "deploy", "hello", "--image", "reg/hello:1", "--port", "3000", "-e", "A=b=c", "--concurrency", "4",
		"--min", "1", "--max", "5", "--window", "30s", "--grace", "0s", "--host", "hello.example", "--command", "/serve", "--memory", "512Mi", "--cpu", "0.5",
		"--tenant", "acme", "--merge", "low", "--writable-root", "--", "--fast")
	if got != 0 {
		t.Fatal(errs)
	}
	want := &hearthv1.FunctionSpec{
		Image: "reg/hello:1", Port: 3000, Tenant: "acme", Group: "low", Env: map[string]string{"A": "b=c"}, Command: []string{"/serve"}, Args: []string{"--fast"},
		Hosts: []string{"hello.example"}, Resources: &hearthv1.Resources{MemoryBytes: 512 << 20, CpuMillis: 500},
		Scaling:      &hearthv1.Scaling{Concurrency: 4, Min: 1, Max: 5, Window: durationpb.New(30 * time.Second), Grace: durationpb.New(0)},
		WritableRoot: true,
	}
	if diff := cmp.Diff(want, f.applied.GetFunction().GetSpec(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if !f.applied.GetPrepare() {
		t.Error("does not wait for the image")
	}
	f.want(t, 0, "all quiet", "list")
	f.want(t, 0, `"revision": "hello-00001"`, "list", "-o", "json")
	f.want(t, 0, "i-1        serving   sandbox    -         hello", "ps")
	f.want(t, 0, "i-4        frozen    revision   python    other      -             -                 i-0   -     -", "ps")
	f.want(t, 0, "STATE_WARM", "ps", "-o", "json")
	f.want(t, 0, "i-1 | one\ni-1 | two\n", "logs", "hello")
	f.want(t, 0, "one\ntwo\n", "logs", "hello", "--instance", "i-1")
	f.want(t, 4, "there is no function other; see `hearth list`", "delete", "other")
	f.want(t, 0, "deleted", "delete", "hello")
	if out := f.want(t, 0, "", "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty list is %q", out)
	}
}

func TestStatus(t *testing.T) {
	f := newFake(t)
	out := f.want(t, 0, "0 functions, 1 warm of 2 wanted, 1 warm python, 1 serving, 1 frozen", "status")
	for _, want := range []string{"Deployment test is up", "containerd 2.4.2", "node: not seen yet", "poolmanager"} {
		if !strings.Contains(out, want) {
			t.Errorf("does not say %q: %s", want, out)
		}
	}
	var s struct {
		Warm    int
		Degrees map[string]int `json:"warm_by_degree"`
		Frozen  int
		Daemons []struct {
			Restarts int
			Ready    bool
			Reason   string
		}
	}
	if err := json.Unmarshal([]byte(f.want(t, 0, "", "status", "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Warm != 2 || s.Degrees["sandbox"] != 1 || s.Degrees["runtime"] != 1 || s.Frozen != 1 || len(s.Daemons) != 1 || s.Daemons[0].Restarts != 3 || s.Daemons[0].Ready || s.Daemons[0].Reason == "" {
		t.Errorf("%+v", s)
	}
}

func TestInvoke(t *testing.T) {
	f := newFake(t)
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.want(t, 0, `GET /fn/hello ""`, "invoke", "hello")
	f.want(t, 0, `GET /fn/hello/path?a=b ""`, "invoke", "hello", "path?a=b")
	f.want(t, 0, `POST /fn/hello "text"`, "invoke", "hello", "-d", "text")
	f.want(t, 0, `POST /fn/hello "from a file"`, "invoke", "hello", "-d", "@"+file)
	f.want(t, 0, `PUT /fn/hello "from standard input"`, "invoke", "hello", "-X", "put", "-d", "-")
	f.want(t, 0, "X-Seen: yes", "invoke", "hello", "-i", "-H", "X-Sent: yes")
	f.want(t, 2, "want 'Name: value'", "invoke", "hello", "-H", "nothing")
	f.want(t, 4, "404 Not Found", "invoke", "other")
	f.want(t, 5, "503 Service Unavailable; try again in 2 s", "invoke", "hello", "busy")
	f.want(t, 5, "502 Bad Gateway; see `hearth logs hello`", "invoke", "hello", "broken")
}

func TestInvokeCloudEvent(t *testing.T) {
	f := newFake(t)
	f.want(t, 0, "", "invoke", "hello", "event", "--cloudevent", "com.example.order", "-d", `{"id": 7}`, "-H", "Ce-Source: /orders", "-H", "Ce-Subject: seven")
	want := map[string]string{"Ce-Specversion": "1.0", "Ce-Type": "com.example.order", "Ce-Source": "/orders", "Ce-Subject": "seven", "Content-Type": "application/json"}
	for name, value := range want {
		if got := f.event.Values(name); len(got) != 1 || got[0] != value {
			t.Errorf("%s is %q, want %q", name, got, value)
		}
	}
	if _, err := time.Parse(time.RFC3339Nano, f.event.Get("Ce-Time")); err != nil || f.event.Get("Ce-Id") == "" {
		t.Errorf("event %v", f.event)
	}
	f.want(t, 0, "", "invoke", "hello", "event", "--cloudevent", "x")
	if f.event.Get("Content-Type") != "" || f.event.Get("Ce-Id") == "" {
		t.Errorf("event without data: %v", f.event)
	}
}

func TestStart(t *testing.T) {
	f := newFake(t)
	f.want(t, 0, "ms to the first byte", "start", "hello")
	if f.released != nil {
		t.Error("releases without --cold")
	}
	out := f.want(t, 0, "first_byte", "start", "hello", "--trace", "--cold")
	if !strings.Contains(out, "█") || !strings.Contains(out, "process") {
		t.Errorf("no waterfall: %s", out)
	}
	if !f.released.GetWait() || !f.released.GetForgetImage() || f.released.GetFunction() != "hello" {
		t.Errorf("released %v", f.released)
	}
	var s struct {
		FirstByteMS float64 `json:"first_byte_ms"`
		Phases      []struct{ Name, Duration string }
	}
	if err := json.Unmarshal([]byte(f.want(t, 0, "", "start", "hello", "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	if s.FirstByteMS <= 0 || len(s.Phases) != 3 || s.Phases[2].Name != "first_byte" {
		t.Errorf("%+v", s)
	}
}

func TestHiddenWordsStayHidden(t *testing.T) {
	var out strings.Builder
	if code := cli.Exec(t.Context(), []string{"up", "--help"}, strings.NewReader(""), &out, &out); code != 0 || strings.Contains(out.String(), "progress-fd") {
		t.Errorf("exit code %d: %s", code, out.String())
	}
}
