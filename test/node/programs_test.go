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
	programs map[string][]byte   // by what they are made of
	images   map[string]v1.Image // by name and source
}{programs: map[string][]byte{}, images: map[string]v1.Image{}}

// programImage compiles a Go program into an image with nothing else in it.
func programImage(t *testing.T, name, source string) v1.Image {
	t.Helper()
	made.mu.Lock()
	defer made.mu.Unlock()
	key := name + "\n" + source
	if img := made.images[key]; img != nil {
		return img
	}
	main := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(main, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	file := fileEntry(name, string(single(t, main)))
	file.Mode = 0o755
	img, err := mutate.Config(imageOf(t, gzipped, tarball(t, file)), v1.Config{Entrypoint: []string{"/" + name}})
	if err != nil {
		t.Fatal(err)
	}
	made.images[key] = img
	return img
}

// compile makes a static program of one file, which uses the standard library alone.
func compile(t *testing.T, program, source string) {
	t.Helper()
	install(t, program, source, func() []byte { return single(t, source) })
}

// buildCommand makes one of our own commands.
func buildCommand(t *testing.T, name, program string) {
	t.Helper()
	install(t, program, "cmd/"+name, func() []byte { return goBuild(t, os.Environ(), "-trimpath", "../../cmd/"+name) })
}

// install writes a program that is built once for each key.
func install(t *testing.T, path, key string, build func() []byte) {
	t.Helper()
	made.mu.Lock()
	defer made.mu.Unlock()
	if made.programs[key] == nil {
		made.programs[key] = build()
	}
	if err := os.WriteFile(path, made.programs[key], 0o755); err != nil {
		t.Fatal(err)
	}
}

func single(t *testing.T, source string) []byte {
	t.Helper()
	return goBuild(t, append(os.Environ(), "GOFLAGS=-buildvcs=false", "GO111MODULE=off"), "-ldflags", "-s -w", source)
}

func goBuild(t *testing.T, env []string, args ...string) []byte {
	t.Helper()
	program := filepath.Join(t.TempDir(), "program")
	build := exec.Command("go", append([]string{"build", "-o", program}, args...)...)
	build.Env = append(env, "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
