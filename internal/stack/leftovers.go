package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

const (
	endGrace  = 5 * time.Second  // for marked processes between SIGTERM and SIGKILL
	shimGrace = time.Second      // the same for shims, whose containers are dead by then
	clearTime = 40 * time.Second // for all of clear
)

// Leftovers lists all that a deployment has in the running system: processes, mounts (network namespaces are mounts too),
// cgroups, links and sockets. After Run has returned, and after Down, it is empty.
func Leftovers(c Config) ([]string, error) {
	c, err := c.WithDefaults()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range processNames(markedProcesses(c.Run)) {
		out = append(out, "process "+name)
	}
	mounts, err := host.Mounts(host.MountInfo)
	if err != nil {
		return nil, err
	}
	for _, point := range host.MountsWithin(mounts, host.RealDirs(c.Root, c.Run)...) {
		out = append(out, "mount "+point)
	}
	roots, err := host.Cgroups(CgroupParent(c.Name))
	if err != nil {
		return nil, err
	}
	for _, dir := range roots {
		out = append(out, "cgroup "+dir)
	}
	links, err := linksIn(c.paths().lastSubnet())
	if err != nil {
		return nil, err
	}
	for _, link := range links {
		out = append(out, "link "+link.Attrs().Name)
	}
	entries, err := os.ReadDir(c.Run)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if path := filepath.Join(c.Run, e.Name()); path != c.paths().lock() {
			out = append(out, "file "+path)
		}
	}
	return out, nil
}

// clear ends and removes all that Leftovers lists. The caller holds the deployment's locks. Data in Root stays.
func (c Config) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearTime)
	defer cancel()
	// First those who start things, then Instances, then the shims, which would not go before what they keep.
	problems := []error{
		endMarked(ctx, c.Run, endGrace, isDaemon),
		host.RemoveCgroup(ctx, CgroupParent(c.Name)),
		endMarked(ctx, c.Run, shimGrace, isShim),
		host.RemoveCgroup(ctx, CgroupParent(c.Name)),
		host.UnmountAll(host.RealDirs(c.Root, c.Run)...),
		removeLinks(ctx, c.paths().lastSubnet()),
		c.clearFiles(),
	}
	return errors.Join(problems...)
}

// clearFiles empties the Run folder, but for the lock that is held, and removes what the network library keeps elsewhere.
func (c Config) clearFiles() error {
	mounts, err := host.Mounts(host.MountInfo)
	if err != nil {
		return err
	}
	if left := host.MountsWithin(mounts, host.RealDirs(c.Run)...); len(left) > 0 {
		return fmt.Errorf("%s is still mounted: files in %s are left alone", left[0], c.Run)
	}
	entries, err := os.ReadDir(c.Run)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("clear %s: %w", c.Run, err)
	}
	var problems []error
	for _, e := range entries {
		if path := filepath.Join(c.Run, e.Name()); path != c.paths().lock() {
			problems = append(problems, os.RemoveAll(path))
		}
	}
	return errors.Join(append(problems, c.clearResults("/var/lib/cni/results"))...)
}

// clearResults removes what the network library remembers of sandboxes that ended without its being told: a file for the
// network, named NETWORK-SANDBOX-eth0, and one for the sandbox's loopback.
func (c Config) clearResults(dir string) error {
	results, _ := filepath.Glob(filepath.Join(dir, c.network()+"-*-eth0"))
	var problems []error
	for _, path := range results {
		sandbox := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), c.network()+"-"), "-eth0")
		if strings.Contains(sandbox, "-") {
			continue // of a deployment whose name only begins as this one's
		}
		problems = append(problems, os.Remove(path))
		if err := os.Remove(filepath.Join(dir, "cni-loopback-"+sandbox+"-lo")); !errors.Is(err, os.ErrNotExist) {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}
