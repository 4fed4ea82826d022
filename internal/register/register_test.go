package register_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/register"
)

// node is a machine's configuration of a containerd that does not run.
type node struct {
	t      *testing.T
	etc    string // folder of the configuration
	config register.Config
	out    bytes.Buffer
}

// newNode writes files into a folder, with a time long ago, as an administrator did.
func newNode(t *testing.T, files map[string]string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t: t, etc: filepath.Join(dir, "etc")}
	n.config = register.Config{
		Name: "hearth", Address: "/run/hearth/snapshotter.sock", Root: "/var/lib/hearth/snapshotter", Containerd: filepath.Join(dir, "none.sock"),
		Main: filepath.Join(n.etc, "config.toml"), State: filepath.Join(dir, "state"), EditMain: true, Restart: true, Wait: time.Minute, Out: &n.out,
	}
	for name, text := range files {
		n.write(name, text)
	}
	n.age()
	return n
}

func (n *node) write(name, text string) {
	n.t.Helper()
	path := filepath.Join(n.etc, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o640)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	n.t.Helper()
	text, err := os.ReadFile(filepath.Join(n.etc, name))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(text)
}

func (n *node) age() {
	n.t.Helper()
	old := time.Date(2020, 2, 3, 4, 5, 6, 789, time.UTC)
	if err := filepath.WalkDir(n.etc, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(path, old, old))
	}); err != nil {
		n.t.Fatal(err)
	}
}

// tree is every file by its bytes, mode and time of change.
func (n *node) tree() map[string]string {
	n.t.Helper()
	out := map[string]string{}
	if err := filepath.WalkDir(n.etc, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var text []byte
		if info.Mode().IsRegular() {
			if text, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		rel, _ := filepath.Rel(n.etc, path)
		out[rel] = fmt.Sprintf("%s %s %q", info.Mode(), info.ModTime(), text)
		return nil
	}); err != nil {
		n.t.Fatal(err)
	}
	return out
}

func (n *node) register() error   { return register.Do(n.t.Context(), n.config) }
func (n *node) unregister() error { return register.Undo(n.t.Context(), n.config) }

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// registered says whether containerd would know the snapshotter.
func (n *node) registered() bool {
	n.t.Helper()
	config, err := doctor.Load(n.config.Main)
	n.must(err)
	return doctor.Registration{Name: "hearth", Address: n.config.Address, Root: n.config.Root}.Missing(config) == nil
}

func code(err error) int {
	var coded interface{ ExitCode() int }
	if errors.As(err, &coded) {
		return coded.ExitCode()
	}
	return -1
}

// nodes are configurations that people have.
var nodes = map[string]map[string]string{
	"bare":            {"config.toml": "version = 3\n"},
	"no newline":      {"config.toml": "version = 2"},
	"empty imports":   {"config.toml": "version = 3\nimports = []\n[grpc]\naddress = '/x'\n"},
	"one file":        {"config.toml": "version = 3\nimports = ['more.toml']\n", "more.toml": "version = 3\n"},
	"folder":          {"config.toml": "version = 3\nimports = ['conf.d/*.toml']\n", "conf.d/10-other.toml": "version = 3\n"},
	"no folder yet":   {"config.toml": "version = 4\nimports = ['a/b/*.toml']\n"},
	"folder, unnamed": {"config.toml": "version = 3\n", "conf.d/20-unread.toml": "version = 3\n"},
	"CRLF":            {"config.toml": "version = 3\r\nimports = [\r\n]\r\n"},
}

// However often it is registered and unregistered, the last unregister gives everything back.
func TestAnySequenceIsUndone(t *testing.T) {
	for name, files := range nodes {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, files)
			before := n.tree()
			rnd := rand.New(rand.NewPCG(1, 2))
			steps := []string{"register", "register", "unregister", "unregister"}
			for range 12 {
				steps = append(steps, []string{"register", "unregister", "upgrade"}[rnd.IntN(3)])
			}
			for i, step := range append(steps, "unregister") {
				switch step {
				case "upgrade": // another version of the drop-in
					n.config.Root = fmt.Sprintf("/var/lib/hearth/%d", i)
					n.must(n.register())
				case "register":
					n.must(n.register())
				case "unregister":
					n.must(n.unregister())
				}
				if got := n.registered(); got != (step != "unregister") {
					t.Fatalf("step %d of %v: registered: %v", i, steps, got)
				}
				if diff := cmp.Diff(before, n.tree()); step == "unregister" && diff != "" {
					t.Fatalf("step %d of %v:\n%s", i, steps, diff)
				}
			}
			if _, err := os.Stat(n.config.State); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the state is left: %v", err)
			}
		})
	}
}

// A second register changes nothing, not even times.
func TestRegisterAgain(t *testing.T) {
	n := newNode(t, nodes["bare"])
	n.must(n.register())
	n.age()
	before := n.tree()
	n.out.Reset()
	n.must(n.register())
	if diff := cmp.Diff(before, n.tree()); diff != "" {
		t.Error(diff)
	}
	if strings.Contains(n.out.String(), "wrote") || strings.Contains(n.out.String(), "added") {
		t.Errorf("it says %q", n.out.String())
	}
}

func TestRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		files map[string]string
		edit  bool
		says  string
	}{
		"no imports":         {nodes["bare"], false, "imports = ['DIR/conf.d/*.toml']"},
		"imports of no list": {map[string]string{"config.toml": "version = 3\nimports = 'x'\n"}, true, "imports = ['DIR/conf.d/*.toml']"},
		"version 1":          {map[string]string{"config.toml": "[plugins]\n"}, true, "version = 3"},
		"no main file":       {map[string]string{"other.toml": ""}, true, "config.toml"},
		"taken":              {map[string]string{"config.toml": "version = 3\n[proxy_plugins.hearth]\ntype = 'snapshot'\n"}, true, "[proxy_plugins.hearth]"},
		"somebody's file":    {map[string]string{"config.toml": nodes["folder"]["config.toml"], "conf.d/hearth.toml": "version = 3\n"}, true, "conf.d/hearth.toml is not as this program has written it"},
		"overridden":         {map[string]string{"config.toml": nodes["folder"]["config.toml"], "conf.d/zz.toml": "version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = []\n"}, true, "conf.d/zz.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tt.files)
			n.config.EditMain = tt.edit
			before := n.tree()
			err := n.register()
			if says := strings.ReplaceAll(tt.says, "DIR", n.etc); code(err) != register.ExitRefused || !strings.Contains(err.Error(), says) {
				t.Errorf("exit code %d, want %d and %q: %v", code(err), register.ExitRefused, says, err)
			}
			if diff := cmp.Diff(before, n.tree()); diff != "" {
				t.Error(diff)
			}
			if tt.says == "config.toml" {
				return
			}
			n.must(n.unregister())
			if diff := cmp.Diff(before, n.tree()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What is registered by hand is left to those hands.
func TestByHand(t *testing.T) {
	n := newNode(t, nodes["folder"])
	n.must(n.register())
	text := n.read("conf.d/hearth.toml")
	n.must(n.unregister())
	n.write("conf.d/mine.toml", text)
	before := n.tree()
	n.must(n.register())
	n.must(n.unregister())
	if diff := cmp.Diff(before, n.tree()); diff != "" {
		t.Error(diff)
	}
}

// What an administrator has changed in between is kept, without our part.
func TestChangedInBetween(t *testing.T) {
	n := newNode(t, nodes["empty imports"])
	n.must(n.register())
	n.write("config.toml", n.read("config.toml")+"\n[debug]\nlevel = 'debug'\n")
	n.write("conf.d/hearth.toml", n.read("conf.d/hearth.toml")+"# mine\n")
	if err := n.register(); code(err) != register.ExitRefused {
		t.Errorf("a changed drop-in is written over: %v", err)
	}
	n.out.Reset()
	n.must(n.unregister())
	if got, want := n.read("config.toml"), nodes["empty imports"]["config.toml"]+"\n[debug]\nlevel = 'debug'\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := n.read("conf.d/hearth.toml.changed"); !strings.HasSuffix(got, "# mine\n") {
		t.Errorf("the changed drop-in is lost: %q", got)
	}
	if n.registered() || strings.Count(n.out.String(), "changed since") != 2 {
		t.Errorf("registered: %v; it says %q", n.registered(), n.out.String())
	}
}

// The main file was written anew by other hands, without our import.
func TestMainWrittenAnew(t *testing.T) {
	n := newNode(t, nodes["bare"])
	n.must(n.register())
	n.write("config.toml", "version = 3\n# anew\n")
	n.must(n.register())
	if !n.registered() {
		t.Error("it is not registered again")
	}
	n.must(n.unregister())
	if got := n.read("config.toml"); got != "version = 3\n# anew\n" {
		t.Errorf("got %q", got)
	}
	n.must(n.register())
	n.write("config.toml", "version = 3\n# again\n")
	n.must(n.unregister())
	if got := n.read("config.toml"); got != "version = 3\n# again\n" {
		t.Errorf("got %q", got)
	}
}

// The imports lead to another folder than before.
func TestImportsMove(t *testing.T) {
	n := newNode(t, nodes["folder"])
	n.must(n.register())
	n.write("config.toml", "version = 3\nimports = ['elsewhere/*.toml']\n")
	n.must(n.register())
	if _, err := os.Stat(filepath.Join(n.etc, "conf.d/hearth.toml")); !errors.Is(err, fs.ErrNotExist) || !n.registered() {
		t.Errorf("the former drop-in: %v; registered: %v", err, n.registered())
	}
	n.must(n.unregister())
	if n.registered() {
		t.Error("still registered")
	}
}

// Whatever was done when the machine stopped, register goes on and unregister takes it back.
func TestInterrupted(t *testing.T) {
	whole := newNode(t, nodes["no newline"])
	before := whole.tree()
	whole.must(whole.register())
	edited, drop := whole.read("config.toml"), whole.read("conf.d/hearth.toml")
	undone := map[string]func(n *node){
		"nothing was written": func(n *node) { n.remove("conf.d"); n.write("config.toml", nodes["no newline"]["config.toml"]) },
		"an empty folder": func(n *node) {
			n.remove("conf.d/hearth.toml")
			n.write("config.toml", nodes["no newline"]["config.toml"])
		},
		"the drop-in alone": func(n *node) { n.write("config.toml", nodes["no newline"]["config.toml"]) },
		"the import alone":  func(n *node) { n.remove("conf.d") },
	}
	for name, undo := range undone {
		t.Run(name, func(t *testing.T) {
			for _, again := range []bool{false, true} {
				n := newNode(t, nodes["no newline"])
				n.must(n.register())
				undo(n)
				if again {
					n.must(n.register())
					if got := strings.ReplaceAll(n.read("config.toml"), n.etc, whole.etc); got != edited || n.read("conf.d/hearth.toml") != drop {
						t.Errorf("got %q", got)
					}
				}
				n.must(n.unregister())
				after := n.tree()
				delete(after, ".")
				want := map[string]string{"config.toml": before["config.toml"]}
				if !again { // that file was written by this test
					want["config.toml"], after["config.toml"] = "", ""
				}
				if diff := cmp.Diff(slices.Sorted(mapsKeys(want)), slices.Sorted(mapsKeys(after))); diff != "" {
					t.Error(diff)
				}
				if got := n.read("config.toml"); got != nodes["no newline"]["config.toml"] {
					t.Errorf("got %q", got)
				}
			}
		})
	}
}

func mapsKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (n *node) remove(name string) {
	n.t.Helper()
	n.must(os.RemoveAll(filepath.Join(n.etc, name)))
}

// A link to the configuration stays one, and modes and owners stay.
func TestLink(t *testing.T) {
	n := newNode(t, map[string]string{"real/containerd.toml": "version = 3\n"})
	n.must(os.Symlink("real/containerd.toml", n.config.Main))
	n.must(os.Chmod(filepath.Join(n.etc, "real/containerd.toml"), 0o604))
	n.age()
	before := n.tree()
	n.must(n.register())
	info, err := os.Lstat(n.config.Main)
	n.must(err)
	if info.Mode()&fs.ModeSymlink == 0 || !n.registered() {
		t.Errorf("mode %s, registered: %v", info.Mode(), n.registered())
	}
	if info, err = os.Stat(n.config.Main); err != nil || info.Mode() != 0o604 {
		t.Errorf("mode %s, %v", info.Mode(), err)
	}
	n.must(n.unregister())
	if diff := cmp.Diff(before, n.tree()); diff != "" {
		t.Error(diff)
	}
}

// Without the registration containerd's CRI would not start.
func TestUnregisterIsRefused(t *testing.T) {
	n := newNode(t, map[string]string{"config.toml": "version = 3\nimports = ['conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'hearth'\n"})
	n.must(n.register())
	if err := n.unregister(); code(err) != register.ExitRefused || !strings.Contains(err.Error(), "snapshotter = 'overlayfs'") || !n.registered() {
		t.Errorf("got %v", err)
	}
}

func TestNoContainerd(t *testing.T) {
	n := newNode(t, nodes["bare"])
	n.config.Main = ""
	if err := n.register(); err == nil || code(err) != -1 || !strings.Contains(err.Error(), "--containerd-config") {
		t.Errorf("got %v", err)
	}
}

func TestPreview(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	n := newNode(t, nodes["folder"])
	before := n.tree()
	path := filepath.Join(n.etc, "conf.d/deep/er/new.toml")
	files := map[string][]byte{path: []byte("new"), n.config.Main: []byte("other")}
	err := register.Preview(files, func() error {
		if n.read("config.toml") != "other" || n.read("conf.d/deep/er/new.toml") != "new" || n.read("conf.d/10-other.toml") != "version = 3\n" {
			return errors.New("the files are not there")
		}
		return nil
	})
	n.must(err)
	if diff := cmp.Diff(before, n.tree()); diff != "" {
		t.Error(diff)
	}
}

func TestConfigOf(t *testing.T) {
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"/etc/containerd/config.toml", nil},
		{"/a/b.toml", []string{"-l", "debug", "--config", "/a/b.toml"}},
		{"/a/b.toml", []string{"--config=/a/../a/b.toml"}},
		{"/cwd/b.toml", []string{"-c", "b.toml"}},
		{"/cwd/b.toml", []string{"-c=b.toml", "--root", "/x"}},
		{"/etc/containerd/config.toml", []string{"--config"}},
	} {
		if got := register.ConfigOf("/cwd", tt.args...); got != tt.want {
			t.Errorf("%v: got %s, want %s", tt.args, got, tt.want)
		}
	}
}

func TestUnitOf(t *testing.T) {
	for cgroups, want := range map[string]string{
		"0::/system.slice/containerd.service\n":                              "containerd.service",
		"12:pids:/x.service\n1:name=systemd:/system.slice/k3s.service\n0::/": "k3s.service",
		"0::/system.slice/containerd.service/supervised\n":                   "containerd.service",
		"0::/user.slice/user-0.slice/session-1.scope\n":                      "",
		"0::/\n":                          "",
		"":                                "",
		"0::/system.slice/a b.service":    "",
		"0::/system.slice/--help.service": "",
		"0::/kubepods.slice/x.slice/cri-containerd-1.scope": "",
	} {
		if got := register.UnitOf(cgroups); got != want {
			t.Errorf("%q: got %q, want %q", cgroups, got, want)
		}
	}
}

func TestMountsBelow(t *testing.T) {
	table := "1 0 8:1 / / rw - ext4 x rw\n2 1 0:1 / /var/lib/h rw - tmpfs t rw\n3 2 0:1 / /var/lib/h/a\\040b rw - x y\n4 3 0:1 / /var/lib/h/a\\040b/c rw\n5 1 0:1 / /var/lib/hh rw\nodd\n"
	if diff := cmp.Diff([]string{"/var/lib/h/a b/c", "/var/lib/h/a b"}, register.MountsBelow(table, "/var/lib/h")); diff != "" {
		t.Error(diff)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version": 1, "dropIn": {"path": "/etc/containerd/conf.d/hearth.toml", "sha256": "x"}, "main": {"path": "/a", "added": "b"}, "folders": ["/c"], "times": [{"path": "/d"}]}`))
	f.Add([]byte(`{"version": 1, "folders": ["/../x"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := register.ParseRecord(data)
		if err != nil {
			return
		}
		if path := r.DropIn.Path; !filepath.IsAbs(path) || filepath.Clean(path) != path {
			t.Errorf("took the path %q", path)
		}
	})
}

func FuzzProc(f *testing.F) {
	f.Add("0::/system.slice/containerd.service\n", "3 2 0:1 / /var/lib/h/a\\040b rw - x y\n")
	f.Fuzz(func(t *testing.T, cgroups, mounts string) {
		if unit := register.UnitOf(cgroups); unit != "" && (strings.ContainsAny(unit, " /;") || unit[0] == '-') {
			t.Errorf("took %q for a unit", unit)
		}
		for _, point := range register.MountsBelow(mounts, "/var/lib/h") {
			if !strings.HasPrefix(point, "/var/lib/h/") {
				t.Errorf("%q is not below", point)
			}
		}
	})
}
