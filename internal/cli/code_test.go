package cli_test

import (
	"archive/tar"
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// folder makes one of files.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// packed are the files of a package, as they are in its registry.
func packed(t *testing.T, ref string) map[string]string {
	t.Helper()
	c, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	img, err := c.Image(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	u, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	l := img.Layers[0]
	src, err := c.Open(t.Context(), ref, l)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var data bytes.Buffer
	if _, err := u.Decompress(t.Context(), src, layer.Spec{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, Indexed: true}, &data); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(&data); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			text, _ := io.ReadAll(r)
			files[h.Name] = string(text)
		}
	}
}

func TestDeployCode(t *testing.T) {
	f := newFake(t)
	files := map[string]string{"main.py": "def greet(r): return 'hello'", ".hearthignore": "notes\n", "notes": "x", "__pycache__/main.pyc": "x", "data/a": "1"}
	dir := folder(t, files)
	f.want(t, 1, "no runtime is called python (there is none yet): make it with `hearth runtime apply python --image REF`", "deploy", "hello", dir)
	f.want(t, 0, "runtime python is applied, generation 1", "runtime", "apply", "python", "--image", "reg/python:1")
	secret := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(secret, []byte("s3cret"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := f.exec(t, "", "deploy", "hello", dir, "--handler", "main.greet", "--signature", "cloudevent", "-e", "A=b", "--secret", "token=@"+secret, "--secret", "other=x=y", "--frozen", "3")
	if code != 0 || !strings.HasSuffix(out, "/fn/hello\n") || !strings.Contains(errs, "code: 3 files, ") || strings.Contains(out+errs, "s3cret") {
		t.Fatalf("exit code %d: %s%s", code, out, errs)
	}
	spec := f.applied.GetFunction().GetSpec()
	ref := spec.GetCode().GetPackage()
	want := &hearthv1.FunctionSpec{
		Runtime: "python", Code: &hearthv1.Code{Package: ref, Handler: "main.greet", Signature: hearthv1.Signature_SIGNATURE_CLOUDEVENT},
		Env: map[string]string{"A": "b"}, Secrets: map[string][]byte{"token": []byte("s3cret"), "other": []byte("x=y")},
		Resources: &hearthv1.Resources{}, Scaling: &hearthv1.Scaling{Frozen: 3},
	}
	if diff := cmp.Diff(want, spec, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(ref, "/code/hello@sha256:") {
		t.Errorf("package %s", ref)
	}
	if got := packed(t, ref); !maps.Equal(got, map[string]string{"main.py": files["main.py"], "data/a": "1"}) {
		t.Errorf("the package has %q", got)
	}
	f.want(t, 0, "python main.greet", "list")
	f.want(t, 0, "", "deploy", "hello", folder(t, files), "--handler", "main.greet") // another place, the same code
	if again := f.applied.GetFunction().GetSpec().GetCode().GetPackage(); again != ref {
		t.Errorf("packed again: %s, not %s", again, ref)
	}
	f.want(t, 0, "", "deploy", "hello", filepath.Join(dir, "main.py"), "--registry", strings.Split(ref, "/")[0]+"/team/")
	if c := f.applied.GetFunction().GetSpec().GetCode(); c.GetHandler() != "main.main" || !strings.Contains(c.GetPackage(), "/team/code/hello@") {
		t.Errorf("a file: %v", c)
	}
}

// refusing is a registry that answers everything with a status.
func refusing(t *testing.T, status int) (address string) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func TestDeployCodeErrors(t *testing.T) {
	f := newFake(t)
	f.want(t, 0, "", "runtime", "apply", "python", "--image", "reg/python:1")
	f.want(t, 0, "", "runtime", "apply", "mine", "--image", "reg/mine:1")
	python := folder(t, map[string]string{"main.py": "x"})
	f.want(t, 1, "code in /nowhere: no such file or directory", "deploy", "hello", "/nowhere")
	f.want(t, 2, "may be for node (package.json) or for python (main.py); name its runtime by --runtime", "deploy", "hello", folder(t, map[string]string{"main.py": "x", "package.json": "{}"}))
	f.want(t, 2, "which class of", "deploy", "hello", folder(t, map[string]string{"a.jar": "x"}))
	f.want(t, 1, "no runtime is called node (there are mine, python)", "deploy", "hello", folder(t, map[string]string{"index.js": "x"}))
	f.want(t, 1, `has no program "main"; name yours by --handler`, "deploy", "hello", python, "--runtime", "native")
	f.want(t, 1, "Another registry is named by --registry", "deploy", "hello", python, "--registry", refusing(t, http.StatusMethodNotAllowed))
	f.want(t, 1, "sign in with `docker login`", "deploy", "hello", python, "--registry", refusing(t, http.StatusForbidden))
	f.want(t, 2, "a function runs one of them", "deploy", "hello", python, "--image", "x")
	if f.applied != nil {
		t.Errorf("applied %v", f.applied)
	}
	f.want(t, 0, "", "deploy", "hello", python, "--runtime", "mine")
	if s := f.applied.GetFunction().GetSpec(); s.GetRuntime() != "mine" || s.GetCode().GetHandler() != "" {
		t.Errorf("spec %v", s)
	}
}

// TestDeployInstalls has pip bring what requirements.txt names, unless --no-deps is said.
func TestDeployInstalls(t *testing.T) {
	f := newFake(t)
	f.want(t, 0, "", "runtime", "apply", "python", "--image", "reg/python:1")
	dir := folder(t, map[string]string{"main.py": "x", "requirements.txt": "flask\n"})
	t.Setenv("PATH", folder(t, map[string]string{"pip": "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\necho installed >\"$1/flask.py\"\n"}))
	f.want(t, 0, "installing what requirements.txt names, with pip", "deploy", "hello", dir)
	names := func() []string {
		return slices.Sorted(maps.Keys(packed(t, f.applied.GetFunction().GetSpec().GetCode().GetPackage())))
	}
	if got := names(); !slices.Equal(got, []string{"flask.py", "main.py", "requirements.txt"}) {
		t.Errorf("packs %q", got)
	}
	t.Setenv("PATH", "/nowhere")
	f.want(t, 1, "there is no pip here: install it, or bring them into "+dir, "deploy", "hello", dir)
	f.want(t, 0, "", "deploy", "hello", dir, "--no-deps")
	if got := names(); !slices.Equal(got, []string{"main.py", "requirements.txt"}) {
		t.Errorf("packs %q", got)
	}
}

func TestRuntimes(t *testing.T) {
	f := newFake(t)
	if out := f.want(t, 0, "", "runtime", "ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty list is %q", out)
	}
	f.want(t, 0, "generation 1", "runtime", "apply", "python", "--image", "reg/python:1", "--preload", "numpy,pandas", "--preload", "flask", "--warm", "2", "-e", "A=b=c")
	want := &hearthv1.Runtime{Name: "python", Image: "reg/python:1", Preload: []string{"numpy", "pandas", "flask"}, Warm: 2, Env: map[string]string{"A": "b=c"}, Generation: 1}
	if diff := cmp.Diff(want, f.runtimes["python"], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.want(t, 0, `"generation": "2"`, "runtime", "apply", "python", "--image", "reg/python:2", "-o", "json")
	f.want(t, 0, "python   2            0      -         reg/python:2", "runtime", "ls")
	f.want(t, 0, "python\n:4", "__complete", "runtime", "rm", "")
	f.want(t, 0, "python\n:4", "__complete", "deploy", "hello", "dir", "--runtime", "")
	f.want(t, 0, "http\ncloudevent\n:4", "__complete", "deploy", "hello", "--signature", "")
	code, _, errs := f.exec(t, "", "runtime", "apply", "broken", "--image", "reg/broken")
	if code != 1 || !strings.Contains(errs, "apply runtime broken: the runtime broken does not boot:\n  Traceback (most recent call last):\n    File \"loader.py\", line 1") ||
		!strings.Contains(errs, "\n  SyntaxError: no\n") || strings.Contains(errs, "\x1b") {
		t.Errorf("exit code %d: %q", code, errs)
	}
	f.want(t, 0, "", "deploy", "hello", folder(t, map[string]string{"main.py": "x"}))
	f.want(t, 1, "delete runtime python: function hello needs it; see `hearth list`", "runtime", "rm", "python")
	f.want(t, 4, "delete runtime node: there is no runtime node; see `hearth runtime ls`", "runtime", "rm", "node")
	f.want(t, 0, "", "delete", "hello")
	f.want(t, 0, "Runtime python is deleted.", "runtime", "rm", "python")
}
