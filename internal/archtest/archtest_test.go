package archtest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/hearth-serverless/hearth"

// maxMainLines is how long a main may be: it wires rooms together and does nothing itself.
const maxMainLines = 150

// floors places every room. A package may import its own room and rooms of lower floors, nothing else of this module.
var floors = map[string]int{
	"internal/relay": 0, "internal/pki": 0,
	"api": 1, "registry": 1, "deploy": 1,
	"internal/host": 1, "internal/daemon": 1, "internal/bpf": 1, "internal/waterfall": 1, "internal/logfile": 1, "internal/archtest": 1,
	"prefetch": 2, "internal/doctor": 2, "internal/keychain": 2, "internal/contentstore": 2, "internal/cripull": 2, "sidecar": 2,
	"runtimes": 1,
	"layer":    2,
	"instance": 3, "snapshotter": 3, "pool": 3, "scaler": 3, "internal/codepack": 3, "internal/register": 3,
	"gateway": 4, "internal/kube": 4, "internal/images": 4, "internal/profiles": 4, "internal/stack": 4, "internal/release": 4,
	"bench": 5, "internal/cli": 5,
	"test": 6,
	"cmd":  7,
}

// families names who may import a third-party family. The longest prefix that fits an import decides.
// Not listed are the words that everyone speaks: the standard library, golang.org/x, connect, protobuf, prometheus, digests
// and containerd's error values.
var families = map[string][]string{
	"github.com/klauspost/compress":                          {"layer", "prefetch", "bench/images"},
	"github.com/pierrec/lz4":                                 {"layer"},
	"github.com/containerd/stargz-snapshotter":               {"layer"},
	"github.com/cilium/ebpf":                                 {"internal/bpf"},
	"go.etcd.io/bbolt":                                       {"pool/store"},
	"github.com/pelletier/go-toml":                           {"internal/doctor"},
	"github.com/google/go-containerregistry":                 {"bench/images"},
	"github.com/spf13/cobra":                                 {"internal/cli", "internal/daemon", "cmd/bench"},
	"github.com/hanwen/go-fuse":                              {"bench/disk"},
	"k8s.io/client-go":                                       {"internal/kube"},
	"sigs.k8s.io/controller-runtime":                         {"internal/kube"},
	"k8s.io/cri-api":                                         {"instance", "bench", "internal/keychain", "internal/images", "internal/cripull"},
	"github.com/containerd/containerd/v2":                    {"instance", "internal/contentstore"},
	"github.com/containerd/containerd/v2/core/remotes":       {"registry"},
	"github.com/containerd/containerd/v2/core/images":        {"registry", "instance"},
	"github.com/containerd/containerd/v2/pkg/reference":      {"registry", "instance"},
	"github.com/containerd/containerd/v2/core/mount":         {"snapshotter", "instance"},
	"github.com/containerd/containerd/v2/core/snapshots":     {"snapshotter"},
	"github.com/containerd/containerd/v2/contrib/snapshotse": {"snapshotter"},
	"github.com/containerd/containerd/v2/contrib/seccomp":    {"instance"},
	"github.com/containerd/containerd/api":                   {"snapshotter", "instance", "internal/doctor", "internal/register", "cmd/nodeagent", "bench"},
}

type pkg struct {
	ImportPath, Dir, Doc, Name string
	GoFiles, Imports           []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,Name,GoFiles,Imports", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list output: %v", err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found %d packages; the house has more", len(pkgs))
	}
	return pkgs
}

// within says whether path is dir or lies under it.
func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// room is the placed folder that holds a package of this module.
func room(importPath string) (string, bool) {
	rel := strings.TrimPrefix(strings.TrimPrefix(importPath, module), "/")
	for name := range floors {
		if within(rel, name) {
			return name, true
		}
	}
	return rel, false
}

// floorFault says what is wrong with importer importing imported, or nothing.
func floorFault(importer, imported string) string {
	if !within(imported, module) {
		return ""
	}
	from, ok := room(importer)
	if !ok {
		return fmt.Sprintf("%s stands on no floor: place it in archtest and in docs/ARCHITECTURE.md", importer)
	}
	to, ok := room(imported)
	if !ok {
		return fmt.Sprintf("%s stands on no floor: place it in archtest and in docs/ARCHITECTURE.md", imported)
	}
	if from == to || floors[from] > floors[to] {
		return ""
	}
	return fmt.Sprintf("%s (floor %d) imports %s (floor %d): imports go downward only", importer, floors[from], imported, floors[to])
}

// familyFault says whether importer may import a third-party package.
func familyFault(importer, imported string) string {
	if within(imported, module) {
		return ""
	}
	owned := ""
	for prefix := range families {
		if strings.HasPrefix(imported, prefix) && len(prefix) > len(owned) {
			owned = prefix
		}
	}
	if owned == "" {
		return ""
	}
	rel := strings.TrimPrefix(importer, module+"/")
	if slices.ContainsFunc(families[owned], func(owner string) bool { return within(rel, owner) }) {
		return ""
	}
	return fmt.Sprintf("%s imports %s, which belongs to %v", importer, imported, families[owned])
}

func TestImportsGoDownward(t *testing.T) {
	for _, p := range list(t) {
		for _, imported := range append(slices.Clone(p.Imports), p.ImportPath) {
			if fault := floorFault(p.ImportPath, imported); fault != "" {
				t.Error(fault)
			}
		}
	}
}

func TestThirdPartyFamiliesHaveOneOwner(t *testing.T) {
	for _, p := range list(t) {
		for _, imported := range p.Imports {
			if fault := familyFault(p.ImportPath, imported); fault != "" {
				t.Error(fault)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	for _, p := range list(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func TestMainsOnlyWire(t *testing.T) {
	for _, p := range list(t) {
		if !within(p.ImportPath, module+"/cmd") {
			continue
		}
		lines := 0
		for _, f := range p.GoFiles {
			data, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			lines += bytes.Count(data, []byte("\n"))
		}
		if lines > maxMainLines {
			t.Errorf("%s has %d lines, over %d: wiring only", p.ImportPath, lines, maxMainLines)
		}
	}
}

// TestRulesCatch makes sure that the rules above can fail.
func TestRulesCatch(t *testing.T) {
	for _, c := range []struct {
		name, importer, imported string
		want                     bool
	}{
		{"downward", "layer", module + "/registry", false},
		{"upward", "registry", module + "/layer", true},
		{"same floor", "pool", module + "/scaler", true},
		{"same room", "pool", module + "/pool/store", false},
		{"unplaced", "nowhere", module + "/api", true},
		{"owner", "layer", "github.com/klauspost/compress/zstd", false},
		{"stranger", "gateway", "github.com/klauspost/compress/zstd", true},
		{"narrower family", "instance", "github.com/containerd/containerd/v2/core/remotes/docker", true},
		{"common", "gateway", "golang.org/x/sync/errgroup", false},
	} {
		got := floorFault(module+"/"+c.importer, c.imported) + familyFault(module+"/"+c.importer, c.imported)
		if (got != "") != c.want {
			t.Errorf("%s: fault %q, want one: %v", c.name, got, c.want)
		}
	}
}
