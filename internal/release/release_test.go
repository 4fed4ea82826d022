package release_test

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hearth-serverless/hearth/internal/release"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
)

// here and elsewhere are this machine's architecture, and another.
var here, elsewhere = elf.EM_X86_64, elf.EM_AARCH64

func TestMain(m *testing.M) {
	if runtime.GOARCH == "arm64" {
		here, elsewhere = elsewhere, here
	}
	m.Run()
}

var programs = []string{"nodeagent", "launcher", "logwriter", "sidecar", "poolmanager", "gateway", "pause"}

// program is the least that is one: a header of ELF, with a loader if it wants one, and something to tell it by.
func program(machine elf.Machine, interpreter bool, name string) []byte {
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Shentsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var out bytes.Buffer
	p := elf.Prog64{Type: uint32(elf.PT_LOAD)}
	if interpreter {
		p.Type = uint32(elf.PT_INTERP)
	}
	h.Phnum = 1
	for _, v := range []any{h, p} {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return append(out.Bytes(), name...)
}

// bin is a folder of programs, and of other things that have no place in images.
func bin(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range programs {
		write(t, filepath.Join(dir, name), program(here, false, name), mode)
	}
	write(t, filepath.Join(dir, "hearth"), program(here, false, "hearth"), mode)
	write(t, filepath.Join(dir, "secret"), []byte("secret"), 0o600)
	return dir
}

func write(t *testing.T, name string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, data, mode); err != nil {
		t.Fatal(err)
	}
}

func build(t *testing.T, dir string) release.Images {
	t.Helper()
	images, err := release.Build(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(images.Close)
	return images
}

// TestSameProgramsSameDigests builds the same programs twice, in other folders, at other times and with other modes.
func TestSameProgramsSameDigests(t *testing.T) {
	one, two := bin(t, 0o755), bin(t, 0o600)
	for _, name := range programs {
		if err := os.Chtimes(filepath.Join(two, name), time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
	}
	before := build(t, one).Digests()
	if diff := cmp.Diff(before, build(t, two).Digests()); diff != "" {
		t.Error(diff)
	}
	write(t, filepath.Join(two, "sidecar"), program(here, false, "other"), 0o755)
	after := build(t, two).Digests()
	if before["hearth/nodeagent"] == after["hearth/nodeagent"] || before["hearth/gateway"] != after["hearth/gateway"] {
		t.Errorf("another sidecar changes %v to %v", before, after)
	}
}

// TestPush reads the images back: what they execute, as whom, and all that is in them.
func TestPush(t *testing.T) {
	server := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	prefix := strings.TrimPrefix(server.URL, "http://") + "/mirror"
	images := build(t, bin(t, 0o700))
	refs, err := images.Push(t.Context(), client, prefix+"/", "v1.2-3-gabc-dirty")
	if err != nil {
		t.Fatal(err)
	}
	if len(refs) != len(release.Names()) {
		t.Errorf("pushed %v", refs)
	}
	dir := func(names ...string) map[string]string {
		out := map[string]string{"./": "755", "usr/": "755", "usr/local/": "755", "usr/local/bin/": "755"}
		for _, n := range names {
			out["usr/local/bin/"+n] = "755 " + n
		}
		return out
	}
	for image, want := range map[string]struct {
		user  string
		files map[string]string
	}{
		"nodeagent":   {"0:0", dir("nodeagent", "launcher", "logwriter", "sidecar")},
		"poolmanager": {"65532:65532", dir("poolmanager")},
		"gateway":     {"65532:65532", dir("gateway")},
		"pause":       {"65532:65532", dir("pause")},
	} {
		ref := refs["hearth/"+image]
		if digest := images.Digests()["hearth/"+image]; ref != prefix+"/hearth/"+image+"@"+digest.String() {
			t.Errorf("%s is %s, with digest %s", image, ref, digest)
		}
		for _, ref := range []string{ref, prefix + "/hearth/" + image + ":v1.2-3-gabc-dirty"} {
			pushed, err := client.Image(t.Context(), ref, "")
			if err != nil {
				t.Fatal(err)
			}
			config := configOf(t, ref)
			if config.Architecture != runtime.GOARCH || config.OS != "linux" || !config.Created.IsZero() || config.Config.User != want.user ||
				!slices.Equal(config.Config.Entrypoint, []string{"/usr/local/bin/" + image}) {
				t.Errorf("%s: %+v", ref, config)
			}
			if diff := cmp.Diff(want.files, files(t, client, pushed)); diff != "" {
				t.Errorf("%s: %s", ref, diff)
			}
		}
	}
	if _, err := images.Push(t.Context(), client, prefix, "not a tag"); err == nil || !strings.Contains(err.Error(), `"not a tag"`) {
		t.Errorf("a tag with blanks: %v", err)
	}
	server.Close()
	if _, err := images.Push(t.Context(), client, prefix, "v2"); err == nil || !strings.Contains(err.Error(), "push image hearth/nodeagent") {
		t.Errorf("a registry that is gone: %v", err)
	}
}

// configOf reads an image's configuration as others do.
func configOf(t *testing.T, ref string) *v1.ConfigFile {
	t.Helper()
	parsed, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	image, err := remote.Image(parsed)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// files are those of an image's one layer, with their modes and the names that end their content.
func files(t *testing.T, client *registry.Client, image *registry.Image) map[string]string {
	t.Helper()
	if len(image.Layers) != 1 {
		t.Fatalf("%d layers", len(image.Layers))
	}
	u, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	l := image.Layers[0]
	src, err := client.Open(t.Context(), image.Ref, l)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var data bytes.Buffer
	if _, err := u.Decompress(t.Context(), src, layer.Spec{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, Indexed: true}, &data); err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for r := tar.NewReader(&data); ; {
		h, err := r.Next()
		if err == io.EOF {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(0, 0)) || strings.Contains(h.Name, "..") || h.Name[0] == '/' {
			t.Errorf("%+v", h)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = fmt.Sprintf("%o", h.Mode)
		if h.Typeflag == tar.TypeReg {
			found[h.Name] += " " + string(text[min(len(text), 120):])
		}
	}
}

func TestProgramsThatAreNone(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(path string) error
		says  []string
	}{
		"missing":    {os.Remove, []string{"image hearth/gateway", "no such file", "`make build`"}},
		"empty":      {func(p string) error { return os.Truncate(p, 0) }, []string{"gateway is no program for Linux"}},
		"cut off":    {func(p string) error { return os.Truncate(p, 70) }, []string{"gateway is no program for Linux"}},
		"text":       {func(p string) error { return os.WriteFile(p, []byte("#!/bin/sh\nexec evil\n"), 0o755) }, []string{"gateway is no program for Linux", "bad magic"}},
		"other":      {func(p string) error { return os.WriteFile(p, program(elsewhere, false, "gateway"), 0o755) }, []string{"gateway in", "is for ", runtime.GOARCH, "for one"}},
		"unknown":    {func(p string) error { return os.WriteFile(p, program(elf.EM_SPARC, false, "gateway"), 0o755) }, []string{"EM_SPARC"}},
		"not static": {func(p string) error { return os.WriteFile(p, program(here, true, "gateway"), 0o755) }, []string{"is not static", "CGO_ENABLED=0"}},
		"link": {func(p string) error {
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Symlink("../../../../etc/shadow", p)
		}, []string{"is no file"}},
		"folder": {func(p string) error {
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Mkdir(p, 0o755)
		}, []string{"is no file"}},
		"too large": {func(p string) error { return os.Truncate(p, 1<<30) }, []string{"256 MiB", "gateway"}},
	} {
		dir := bin(t, 0o755)
		if err := c.spoil(filepath.Join(dir, "gateway")); err != nil {
			t.Fatal(err)
		}
		images, err := release.Build(t.Context(), dir)
		if err == nil {
			images.Close()
			t.Errorf("%s: built", name)
			continue
		}
		for _, says := range c.says {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", name, err, says)
			}
		}
	}
	if _, err := release.Build(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no folder: %v", err)
	}
}

// TestRealPrograms builds the images of what `make build` has made, where it has.
func TestRealPrograms(t *testing.T) {
	dir := filepath.Join("..", "..", "bin")
	for _, name := range programs {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Skipf("%v; `make build` makes it", err)
		}
	}
	images := build(t, dir)
	if diff := cmp.Diff(images.Digests(), build(t, dir).Digests()); diff != "" {
		t.Error(diff)
	}
	for _, i := range images {
		t.Logf("%s for %s: %d bytes, %s", i.Name, runtime.GOARCH, i.Size(), i.Digest())
	}
}
