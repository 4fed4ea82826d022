package doctor_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

var wanted = doctor.Registration{Name: "hearth", Address: "/run/hearth/snapshotter.sock", Root: "/var/lib/hearth/snapshotter"}

// loadText loads a configuration of one file, and of what it imports beside it.
func loadText(t *testing.T, text string, others map[string]string) (*doctor.Config, string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range others {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := doctor.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return c, dir
}

func TestRegistrationText(t *testing.T) {
	const imports = "imports = ['*.drop']\n"
	for name, tt := range map[string]struct {
		text    string
		oldPath bool
		has     []string // of the drop-in
		hasNot  []string
	}{
		"version 3":   {"version = 3\n", false, []string{"version = 3\n", "snapshotter = 'overlayfs'", "snapshotter = 'hearth'"}, []string{"disable_snapshot_annotations"}},
		"version 4":   {"version = 4\n", false, []string{"version = 4\n"}, nil},
		"version 2":   {"version = 2\n", false, []string{"version = 2\n"}, []string{"disable_snapshot_annotations"}},
		"older path":  {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n", false, []string{"disable_snapshot_annotations = false"}, nil},
		"containerd2": {"version = 3\n", true, []string{"disable_snapshot_annotations = false"}, nil},
		"entries are repeated": {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'erofs'\n" +
			"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'erofs'\ndiffer = 'erofs'\nlayer_types = ['a']\n", false,
			[]string{"layer_types = ['a']", "snapshotter = 'erofs'"}, []string{"overlayfs"}},
		"an empty list stays one": {"version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = []\n", false, nil, []string{"overlayfs"}},
		"an entry is there already": {"version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'hearth'\ndiffer = 'walking'\n", false,
			nil, []string{"overlayfs"}},
	} {
		t.Run(name, func(t *testing.T) {
			want := wanted
			want.OldPath = tt.oldPath
			c, dir := loadText(t, imports+tt.text, nil)
			if err := want.Missing(c); err == nil {
				t.Error("it is there before")
			}
			text, mark, err := want.Text(c)
			if err != nil {
				t.Fatal(err)
			}
			again, _, err := want.Text(c)
			if err != nil || !bytes.Equal(text, again) || mark == "" || !bytes.Contains(text, []byte(doctor.ExportMark+" = '"+mark+"'")) {
				t.Errorf("mark %q, error %v, the same again: %v", mark, err, bytes.Equal(text, again))
			}
			for _, s := range tt.has {
				if !bytes.Contains(text, []byte(s)) {
					t.Errorf("no %q in\n%s", s, text)
				}
			}
			for _, s := range tt.hasNot {
				if bytes.Contains(text, []byte(s)) {
					t.Errorf("%q in\n%s", s, text)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "hearth.drop"), text, 0o600); err != nil {
				t.Fatal(err)
			}
			merged, err := doctor.Load(filepath.Join(dir, "config.toml"))
			if err != nil {
				t.Fatal(err)
			}
			if err := want.Missing(merged); err != nil {
				t.Error(err)
			}
			was, _ := c.CRISnapshotter()
			if is, _ := merged.CRISnapshotter(); is != was {
				t.Errorf("the CRI's snapshotter was %s and is %s", was, is)
			}
			for _, f := range doctor.Diagnose(merged, nil, "hearth") { // what the node had before is not the drop-in's
				if strings.HasPrefix(f.Check, "containerd.") && f.Status == doctor.Problem {
					t.Errorf("%+v", f)
				}
			}
			without, err := doctor.LoadWithout(filepath.Join(dir, "config.toml"), filepath.Join(dir, "hearth.drop"))
			if err != nil {
				t.Fatal(err)
			}
			if _, knows := without.Knows("hearth"); knows || len(without.Paths()) != 1 {
				t.Errorf("without the drop-in it reads %v", without.Paths())
			}
		})
	}
}

func TestRegistrationIsRefused(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"no version":        {"", "version = 3"},
		"version 1":         {"version = 1\n", "version = 3"},
		"no CRI":            {"version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n", "# disabled_plugins"},
		"the name is taken": {"version = 3\n[proxy_plugins.hearth]\ntype = 'snapshot'\naddress = '/elsewhere'\n", "[proxy_plugins.hearth]"},
		"unknown default":   {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'zfs'\n", "snapshotter = 'zfs', differ"},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := loadText(t, tt.text, nil)
			_, _, err := wanted.Text(c)
			var refusal *doctor.Refusal
			if !errors.As(err, &refusal) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "config.toml") {
				t.Errorf("got %v, want a refusal with %q", err, tt.want)
			}
		})
	}
}

// A file that is read later can undo what the drop-in says.
func TestRegistrationIsOverridden(t *testing.T) {
	c, dir := loadText(t, "version = 3\nimports = ['*.drop']\n", nil)
	text, _, err := wanted.Text(c)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ text, want string }{
		"address":    {"[proxy_plugins.hearth]\ntype = 'snapshot'\naddress = '/elsewhere'\n", "address = '/run/hearth"},
		"rebase":     {"[proxy_plugins.hearth]\ntype = 'snapshot'\naddress = '/run/hearth/snapshotter.sock'\ncapabilities = ['rebase']\n[proxy_plugins.hearth.exports]\nroot = '/var/lib/hearth/snapshotter'\nenable_remote_snapshot_annotations = 'true'\n", "# capabilities"},
		"handler":    {"[plugins.'io.containerd.cri.v1.images'.runtime_platforms.hearth]\nsnapshotter = 'overlayfs'\n", "snapshotter = 'hearth'"},
		"unpack":     {"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'overlayfs'\ndiffer = 'walking'\n", "snapshotter = 'hearth'"},
		"older path": {"[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n", "disable_snapshot_annotations = false"},
	} {
		t.Run(name, func(t *testing.T) {
			for file, text := range map[string][]byte{"hearth.drop": text, "later.drop": []byte("version = 3\n" + tt.text)} {
				if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			merged, err := doctor.Load(filepath.Join(dir, "config.toml"))
			if err != nil {
				t.Fatal(err)
			}
			if err := wanted.Missing(merged); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "later.drop") {
				t.Errorf("got %v, want %q in later.drop", err, tt.want)
			}
		})
	}
}

func TestDropInPath(t *testing.T) {
	for name, tt := range map[string]struct{ imports, want string }{
		"none":        {"", ""},
		"empty":       {"imports = []", ""},
		"absolute":    {"imports = ['/etc/containerd/conf.d/*.toml']", "/etc/containerd/conf.d/hearth.toml"},
		"relative":    {"imports = ['conf.d/*']", "DIR/conf.d/hearth.toml"},
		"up":          {"imports = ['../x/*.toml']", "UP/x/hearth.toml"},
		"one file":    {"imports = ['hearth.toml']", ""},
		"other names": {"imports = ['/a/nvidia-*.toml', '/b/h*.toml']", "/b/hearth.toml"},
		"star folder": {"imports = ['/a/*/x.toml', '/a/*/*.toml']", ""},
		"no texts":    {"imports = [1, '/c/*.toml']", "/c/hearth.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"hearth.toml": "version = 3"}
			c, dir := loadText(t, "version = 3\n"+tt.imports+"\n", files)
			got, ok := c.DropIn("hearth.toml")
			want := strings.NewReplacer("DIR", dir, "UP", filepath.Dir(dir)).Replace(tt.want)
			if got != want || ok != (want != "") {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestAddImport(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"nothing":        {"", "imports = ['/d/*.toml'] # added by nodeagent register\n"},
		"no imports":     {"# mine\nversion = 3\n[grpc]\nimports = ['no']\n", "imports = ['/d/*.toml'] # added by nodeagent register\n# mine\nversion = 3\n[grpc]\nimports = ['no']\n"},
		"empty":          {"version = 3\nimports = []\n", "version = 3\nimports = ['/d/*.toml']\n"},
		"empty, spread":  {"imports = [\n  # none\n]\n", "imports = ['/d/*.toml'\n  # none\n]\n"},
		"one":            {"imports = [\"a\"] # x\n", "imports = [\"a\", '/d/*.toml'] # x\n"},
		"trailing comma": {"imports = [\n  'a', # why\n  'b', # because\n]\n", "imports = [\n  'a', # why\n  'b', '/d/*.toml', # because\n]\n"},
		"brackets":       {"imports = [ '[a]', \"]\" ]\r\nversion = 3\r\n", "imports = [ '[a]', \"]\", '/d/*.toml' ]\r\nversion = 3\r\n"},
		"quoted key":     {"version = 3\n\"imports\" = ['''a''']\n", "version = 3\n\"imports\" = ['''a''', '/d/*.toml']\n"},
		"no texts":       {"imports = [1]\n", ""},
		"no list":        {"imports = 'a'\n", ""},
		"no TOML":        {"imports = [\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := doctor.AddImport([]byte(tt.text), "/d/*.toml")
			if string(got) != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
	if _, err := doctor.AddImport(nil, "it's"); err == nil {
		t.Error("a pattern with a quote was taken")
	}
}

func FuzzAddImport(f *testing.F) {
	for _, text := range []string{"", "imports = []", "imports = ['a', \"b\"]", "imports = [ # c\n '''x''' , ]", "\ufeffversion = 3", "a.imports = ['x']", "imports.x = 1", "[t]\nimports = []", good["2"]} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		out, err := doctor.AddImport(text, "/d/*.toml")
		if err != nil {
			return
		}
		added := len(out) - len(text)
		at := 0
		for at < len(text) && text[at] == out[at] {
			at++
		}
		if added <= 0 || !bytes.Equal(slices.Concat(out[:at], out[at+added:]), text) {
			t.Errorf("more than an insertion: %q, %q", text, out)
		}
		if _, err := doctor.Parse(bytes.NewReader(out)); err != nil {
			t.Errorf("%q cannot be read: %v", out, err)
		}
	})
}

// What was written with any configuration can be laid over it.
func FuzzRegistration(f *testing.F) {
	for _, text := range []string{"version = 3", good["2"], "version = 4\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [1, {a = [1]}]", "version = 2\nplugins = 1", "version = 3\nproxy_plugins = 2"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := doctor.Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		drop, _, err := wanted.Text(c)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error that says nothing")
			}
			return
		}
		if _, err := doctor.Parse(bytes.NewReader(drop)); err != nil {
			t.Errorf("%v:\n%s", err, drop)
		}
	})
}

func ExampleRegistration() {
	c, _ := doctor.Parse(strings.NewReader("version = 3\n"))
	text, mark, err := doctor.Registration{Name: "hearth", Address: "/run/hearth/snapshotter.sock", Root: "/var/lib/hearth/snapshotter"}.Text(c)
	fmt.Println(strings.NewReplacer(runtime.GOARCH, "ARCH", mark, "MARK").Replace(string(text)), err)
	// Output:
	// # Hearth's snapshotter, for the images of its functions; every other image is pulled as before. Made by "nodeagent register";
	// # "nodeagent unregister" removes it. unpack_config repeats what was there, because containerd replaces lists as a whole.
	// version = 3
	//
	// [plugins]
	// [plugins.'io.containerd.cri.v1.images']
	// [plugins.'io.containerd.cri.v1.images'.runtime_platforms]
	// [plugins.'io.containerd.cri.v1.images'.runtime_platforms.hearth]
	// snapshotter = 'hearth'
	//
	// [plugins.'io.containerd.transfer.v1.local']
	// [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
	// differ = 'walking'
	// platform = 'linux/ARCH'
	// snapshotter = 'overlayfs'
	//
	// [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
	// differ = 'walking'
	// platform = 'linux/ARCH'
	// snapshotter = 'hearth'
	//
	// [proxy_plugins]
	// [proxy_plugins.hearth]
	// address = '/run/hearth/snapshotter.sock'
	// type = 'snapshot'
	//
	// [proxy_plugins.hearth.exports]
	// enable_remote_snapshot_annotations = 'true'
	// registration = 'MARK'
	// root = '/var/lib/hearth/snapshotter'
	//  <nil>
}
