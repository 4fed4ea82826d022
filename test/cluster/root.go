package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// kernelSettings are what a kubelet wants of the whole machine. It sees them as it wants them, and the host's stay as they are.
var kernelSettings = map[string]string{
	"vm/overcommit_memory":     "1",
	"vm/panic_on_oom":          "0",
	"kernel/panic":             "10",
	"kernel/panic_on_oops":     "1",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}

// buildRoot makes the root that a machine sees, in a mount namespace that is new and the calling thread's. It is a file system
// in memory with the host's top folders mounted into it, and the machine's own ones instead of some; what else the host has
// mounted is not seen, and not held. At the end everything propagates, as containers with bidirectional mounts need.
func (m machine) buildRoot() error {
	mounts, err := host.Mounts(host.MountInfo)
	if err != nil {
		return err
	}
	root := filepath.Join(m.dir, "root")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts apart from the host's: %w", err)
	}
	if err := unix.Mount("root", root, "tmpfs", 0, "mode=0755,size=64m"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, step := range []func() error{
		func() error { return m.mountTop(root) },
		func() error { return mountKernel(root, mounts) },
		func() error { return m.mountTools(root) },
		func() error { return settle(root) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// mountTop fills the root with the host's folders and links, and with the machine's own folders.
func (m machine) mountTop(root string) error {
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case slices.Contains(ownFolders, name) || slices.Contains([]string{"dev", "proc", "sys"}, name):
		case e.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink("/" + name)
			if err != nil {
				return err
			}
			if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
				return err
			}
		case e.IsDir():
			if err := bind("/"+name, filepath.Join(root, name), 0); err != nil {
				return err
			}
		}
	}
	for _, name := range ownFolders {
		if err := bind(filepath.Join(m.dir, name), filepath.Join(root, name), 0); err != nil {
			return err
		}
	}
	return nil
}

// mountKernel shows devices, processes and cgroups as the host does, and the machine's own network in /sys.
func mountKernel(root string, mounts []host.Mount) error {
	for _, name := range []string{"dev", "proc"} {
		if err := bind("/"+name, filepath.Join(root, name), unix.MS_REC); err != nil {
			return err
		}
	}
	sys := filepath.Join(root, "sys")
	if err := os.MkdirAll(sys, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", sys, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	for _, mount := range mounts {
		rest, below := strings.CutPrefix(mount.Point, "/sys/")
		if !below || len(host.MountsWithin([]host.Mount{mount}, mountPoints(mounts, "/sys/")...)) > 0 {
			continue // it comes with the one above it
		}
		if err := bind(mount.Point, filepath.Join(sys, rest), unix.MS_REC); err != nil {
			return err
		}
	}
	for name, value := range kernelSettings {
		file := filepath.Join(root, "run/kernel", strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
			return err
		}
		if err := unix.Mount(file, filepath.Join(root, "proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("show the setting %s: %w", name, err)
		}
	}
	return nil
}

func mountPoints(mounts []host.Mount, prefix string) []string {
	var out []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, prefix) {
			out = append(out, m.Point)
		}
	}
	return out
}

// mountTools shows the programs at the paths that the host has them at, and the network plugins where containerd looks for them.
func (m machine) mountTools(root string) error {
	for _, dir := range m.tools {
		if err := bind(dir, filepath.Join(root, dir), 0); err != nil {
			return err
		}
		if cni := filepath.Join(dir, "cni"); isFolder(cni) {
			if err := bind(cni, filepath.Join(root, "opt/cni/bin"), 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle makes root the root, and lets mounts propagate from here on.
func settle(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil { // the old one lies on the new one then
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	return nil
}

// bind shows a folder at another path too, which it makes where it can.
func bind(from, to string, flags uintptr) error {
	if err := os.MkdirAll(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("show %s at %s: %w", from, to, err)
	}
	return nil
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
