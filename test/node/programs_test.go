package node_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// made is what several tests want: to link a program, or to compress it under the race detector, takes seconds.
var made = struct {
	mu       sync.Mutex
	programs map[string][]byte   // by source
	images   map[string]v1.Image // by name and source
}{programs: map[string][]byte{}, images: map[string]v1.Image{}}

// programImage compiles a Go program into an image with nothing else in it.
func programImage(t *testing.T, name, source string) v1.Image {
	t.Helper()
	program := compiled(t, source)
	made.mu.Lock()
	defer made.mu.Unlock()
	key := name + "\n" + source
	if img := made.images[key]; img != nil {
		return img
	}
	file := fileEntry(name, string(program))
	file.Mode = 0o755
	img, err := mutate.Config(imageOf(t, gzipped, tarball(t, file)), v1.Config{Entrypoint: []string{"/" + name}})
	if err != nil {
		t.Fatal(err)
	}
	made.images[key] = img
	return img
}

// compiled is a static program of one file, which uses the standard library alone.
func compiled(t *testing.T, source string) []byte {
	t.Helper()
	return program(t, source, func(out string) *exec.Cmd {
		file := filepath.Join(filepath.Dir(out), "main.go")
		if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
			t.Fatal(err)
		}
		build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", out, file)
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GO111MODULE=off")
		return build
	})
}

// program is what a command builds, which is run once for each key.
func program(t *testing.T, key string, command func(out string) *exec.Cmd) []byte {
	t.Helper()
	made.mu.Lock()
	defer made.mu.Unlock()
	if made.programs[key] == nil {
		file := filepath.Join(t.TempDir(), "program")
		if out, err := command(file).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		made.programs[key] = text
	}
	return made.programs[key]
}

// install writes a program to a file of the test's own.
func install(t *testing.T, name string, program []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
