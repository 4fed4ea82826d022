package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

// group is a cgroup, in one hierarchy.
type group struct {
	controllers []string // of the hierarchy, or none: version 2
	id          uint64   // within the hierarchy: the inode number of its directory
	path        string   // from the top of the hierarchy, as /proc/PID/cgroup has it
}

// maxGroups bounds the cgroups of a recording.
const maxGroups = 64

// findGroups takes the cgroups of directories, and one hierarchy of each.
func findGroups(dirs []string) ([]group, error) {
	if len(dirs) == 0 || len(dirs) > maxGroups {
		return nil, fmt.Errorf("%d cgroups, not 1 to %d", len(dirs), maxGroups)
	}
	mounts, err := host.Mounts(host.MountInfo)
	if err != nil {
		return nil, err
	}
	var groups []group
	for _, dir := range dirs {
		g, err := findGroup(mounts, dir)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(groups, func(other group) bool { return other.path == g.path }) {
			groups = append(groups, g)
		}
	}
	return groups, nil
}

func findGroup(mounts []host.Mount, dir string) (group, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return group{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return group{}, &os.PathError{Op: "stat", Path: real, Err: err}
	}
	for _, m := range slices.Backward(mounts) {
		below, ok := strings.CutPrefix(real, strings.TrimSuffix(m.Point, "/"))
		if !ok || m.Device != st.Dev || below != "" && below[0] != '/' {
			continue
		}
		g := group{id: st.Ino, path: strings.TrimSuffix(m.Root, "/") + below}
		switch m.Kind {
		case "cgroup2":
			return g, nil
		case "cgroup":
			g.controllers = strings.Split(m.Options, ",")
			return g, nil
		}
	}
	return group{}, fmt.Errorf("%s is no cgroup", dir)
}
