package instance_test

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/instance"
)

// TestDetach makes root file systems of images whose makers put other things where a container's mounts belong.
func TestDetach(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("mounting wants root")
	}
	link := func(to string) func(string) error {
		return func(path string) error { return os.Symlink(to, path) }
	}
	directory := func(path string) error { return os.MkdirAll(path, 0o755) }
	file := func(path string) error { return os.WriteFile(path, []byte("the image's"), 0o644) }
	for name, c := range map[string]struct {
		path string
		make func(path string) error
		etc  string // where /etc really is, if not there
		bad  string // what the error has to name
	}{
		"an empty image":                  {path: "x", make: directory},
		"/tmp is a link":                  {path: "tmp", make: link("/outside")},
		"all there":                       {path: "etc/hosts", make: file},
		"a link out of the tree by ..":    {path: "etc/resolv.conf", make: link("../../../../../../outside")},
		"an absolute link":                {path: "proc", make: link("/outside")},
		"a link to nowhere":               {path: "etc/hostname", make: link("/run/there/is/nothing")},
		"the parent is a link":            {path: "etc", make: link("/"), etc: "."},
		"a directory where a file goes":   {path: "etc/hosts", make: directory, bad: "/etc/hosts"},
		"a file where a directory goes":   {path: "dev", make: file, bad: "/dev"},
		"the parent is a file":            {path: "etc", make: file, bad: "/etc/hosts"},
		"the parent is a link to nowhere": {path: "etc", make: link("/nowhere/at/all"), bad: "/etc/hosts"},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			if err := mount.All([]mount.Mount{{Type: "tmpfs", Source: "tmpfs"}}, top); err != nil { // overlay on overlay is refused
				t.Fatal(err)
			}
			defer func() {
				if err := mount.UnmountAll(top, 0); err != nil { // busy if anything of it were still mounted
					t.Error(err)
				}
			}()
			for _, dir := range []string{"lower/etc", "upper", "work", "scratch", "outside"} {
				if err := directory(filepath.Join(top, dir)); err != nil {
					t.Fatal(err)
				}
			}
			target := filepath.Join(top, "lower", c.path)
			if c.path == "etc" {
				if err := os.Remove(target); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.make(target); err != nil {
				t.Fatal(err)
			}
			root, err := instance.Detach([]mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
				"lowerdir=" + filepath.Join(top, "lower"), "upperdir=" + filepath.Join(top, "upper"), "workdir=" + filepath.Join(top, "work"),
			}}}, filepath.Join(top, "scratch"))
			if outside, _ := os.ReadDir(filepath.Join(top, "outside")); len(outside) > 0 {
				t.Errorf("%s was made outside the tree", outside[0].Name())
			}
			if c.bad != "" {
				if err == nil || !strings.Contains(err.Error(), c.bad) {
					t.Errorf("got %v, want an error that names %s", err, c.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			etc := cmp.Or(c.etc, "etc")
			for path, isDir := range map[string]bool{"proc": true, "dev": true, "sys": true, "run": true, "tmp": true, "var/tmp": true, etc + "/hosts": false, etc + "/resolv.conf": false} {
				info, err := os.Lstat(fmt.Sprintf("/proc/self/fd/%d/%s", root.Tree.Fd(), path))
				if err != nil || info.IsDir() != isDir || info.Mode()&os.ModeSymlink != 0 {
					t.Errorf("%s is %v, %v", path, info, err)
				}
			}
			for _, dir := range []string{"scratch", "upper", "work"} {
				if seen, _ := os.ReadDir(filepath.Join(top, dir)); len(seen) > 0 {
					t.Errorf("%s has %s: the mount can be seen, or what is written to it is on the disk", dir, seen[0].Name())
				}
			}
		})
	}
}

// TestRootTakesItsShare: what is written to a root file system is bounded, and the bound can be set.
func TestRootTakesItsShare(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("mounting wants root")
	}
	lower := t.TempDir()
	if err := os.Chmod(lower, 0o751); err != nil {
		t.Fatal(err)
	}
	root, err := instance.Detach([]mount.Mount{{Type: "bind", Source: lower, Options: []string{"rw", "rbind"}}}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	top := fmt.Sprintf("/proc/self/fd/%d", root.Tree.Fd())
	if info, err := os.Stat(top); err != nil || info.Mode().Perm() != 0o751 {
		t.Errorf("the root is %v, %v", info, err)
	}
	fill := func() (written int, err error) {
		f, err := os.Create(top + "/fill")
		if err != nil {
			return 0, err
		}
		defer f.Close()
		for block := make([]byte, 1<<20); err == nil && written < 64; written++ {
			_, err = f.Write(block)
		}
		return written, err
	}
	if n, err := fill(); n > 2 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("as it is prepared it takes %d MiB, %v", n, err)
	}
	if err := root.MakeRoom(8 << 20); err != nil {
		t.Fatal(err)
	}
	if n, err := fill(); n < 7 || n > 9 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("with 8 MiB it takes %d, %v", n, err)
	}
	if err := root.MakeRoom(1 << 20); err != nil {
		t.Errorf("less than it has: %v", err)
	}
	if left, _ := os.ReadDir(lower); len(left) > 0 {
		t.Errorf("%s is on the disk", left[0].Name())
	}
}

// TestManyLayers names more layers than a page of mount options holds in full.
func TestManyLayers(t *testing.T) {
	var lowers []string
	for n := range 120 {
		lowers = append(lowers, fmt.Sprintf("/var/lib/hearth/snapshotter/snapshots/%d/fs", n))
	}
	base, joined := instance.RelativeLowers([]string{"index=off", "lowerdir=" + strings.Join(lowers, ":"), "upperdir=/a/b"})
	if base != "/var/lib/hearth/snapshotter/snapshots" || len(joined) > 1000 {
		t.Errorf("from %s, %d bytes", base, len(joined))
	}
	if !strings.HasPrefix(joined, "index=off,lowerdir=0/fs:1/fs:") || !strings.HasSuffix(joined, ":119/fs,upperdir=/a/b") {
		t.Errorf("got %s", joined)
	}
}
