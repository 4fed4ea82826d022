package stack_test

import (
	"bytes"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// vanished checks, with eyes of its own as well as with the deployment's, that nothing of it runs on.
func vanished(t *testing.T, c stack.Config, s *stack.Status) {
	t.Helper()
	left, err := stack.Leftovers(c)
	if err != nil {
		t.Error(err)
	}
	for _, what := range left {
		t.Errorf("left over: %s", what)
	}
	mounts, err := mountsBelow(c.Root, c.Run)
	if err != nil {
		t.Error(err)
	}
	for _, point := range mounts {
		t.Errorf("left over: mount %s", point)
	}
	for _, pid := range marked(c.Run) {
		t.Errorf("left over: process %s", pid)
	}
	for _, dir := range cgroupsOf(t, "hearth-"+c.Name) {
		t.Errorf("left over: cgroup %s", dir)
	}
	if s != nil {
		checkNetwork(t, netip.MustParsePrefix(s.Subnet))
	}
}

// mountsBelow are the mount points strictly below folders.
func mountsBelow(dirs ...string) (out []string, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		for _, dir := range dirs {
			if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
				out = append(out, fields[4])
			}
		}
	}
	return out, nil
}

// marked are the processes that were started by the deployment in a Run folder.
func marked(run string) (out []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range files {
		data, _ := os.ReadFile(path)
		for v := range bytes.SplitSeq(data, []byte{0}) {
			if string(v) == "HEARTH_STACK="+run {
				name, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "comm"))
				out = append(out, filepath.Base(filepath.Dir(path))+" "+strings.TrimSpace(string(name)))
			}
		}
	}
	return out
}

// cgroupsOf finds folders of a name in any hierarchy, at any depth.
func cgroupsOf(t *testing.T, name string) (out []string) {
	t.Helper()
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && e.Name() == name {
			out = append(out, path)
		}
		return nil // others come and go
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

// checkNetwork finds links and routes of a subnet.
func checkNetwork(t *testing.T, subnet netip.Prefix) {
	t.Helper()
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Error(err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if ip, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok && subnet.Contains(ip) {
			t.Errorf("left over: route %s", r)
		}
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Error(err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && subnet.Contains(ip) {
			t.Errorf("left over: link %s with address %s", a.Label, a.IPNet)
		}
	}
}
