package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/host"
)

const (
	clearTime = 2 * time.Minute // for all of a cluster to go
	lockTime  = 10 * time.Minute
)

// ErrDown says that there is nothing of a cluster.
var ErrDown = errors.New("there is no cluster")

// extent is how much removeAll removes.
type extent int

const (
	exceptFiles extent = iota
	everything
)

// Down ends the cluster of a folder, whatever state it is in, and removes all of it. It returns ErrDown when there is nothing.
func Down(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("only root can end a cluster")
	}
	unlock, err := lock(ctx, id(dir))
	if err != nil {
		return err
	}
	defer unlock()
	left, err := Leftovers(dir)
	if err != nil {
		return err
	}
	if len(left) == 0 {
		return fmt.Errorf("%w in %s", ErrDown, dir)
	}
	ctx, cancel := context.WithTimeout(ctx, clearTime)
	defer cancel()
	return removeAll(ctx, dir, everything)
}

// Leftovers lists what there is of a cluster: cgroups, in which all its processes are, the host's link and its routes with it, and
// its files. Mounts and namespaces are its processes'.
func Leftovers(dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	groups, err := host.Cgroups(cgroup(dir))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, g := range groups {
		out = append(out, "cgroup "+g)
	}
	name := Config{Dir: dir}.cluster(network{}).hostLink()
	if _, err := netlink.LinkByName(name); err == nil {
		out = append(out, "link "+name)
	}
	for _, file := range files(dir) {
		out = append(out, "file "+file)
	}
	return out, nil
}

// files are what a cluster has in its folder, the state last: where there is none, nothing is a cluster's.
func files(dir string) []string {
	if owned(dir) != nil || !exists(stateFile(dir)) {
		return nil
	}
	var out []string
	for _, name := range []string{"kubeconfig", "pause.tar", "control", "nodes"} {
		if path := filepath.Join(dir, name); exists(path) {
			out = append(out, path)
		}
	}
	return append(out, stateFile(dir))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// removeAll removes what Leftovers lists. The caller has the lock.
func removeAll(ctx context.Context, dir string, what extent) error {
	err := errors.Join(
		host.RemoveCgroup(ctx, cgroup(dir)),
		removeLink(Config{Dir: dir}.cluster(network{}).hostLink()))
	if err != nil || what == exceptFiles {
		return err
	}
	for _, file := range files(dir) {
		if err := os.RemoveAll(file); err != nil {
			return err
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// lock keeps others from starting or ending the same cluster meanwhile, or from choosing addresses. It is a name in the abstract
// namespace of sockets: no file, gone with its process.
func lock(ctx context.Context, what string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		l, err := new(net.ListenConfig).Listen(ctx, "unix", "@hearth-cluster-"+what)
		if err == nil {
			return func() { _ = l.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock the cluster: %w", err)
		}
		if !host.Pause(ctx, pauseTime) {
			return nil, errors.New("another process is starting or ending this cluster")
		}
	}
}
