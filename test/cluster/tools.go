package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// needed are the programs of a cluster.
var needed = []string{
	"etcd", apiserver, "kube-controller-manager", "kube-scheduler", "coredns", "kubectl", kubelet, kubeProxy,
	containerd, "containerd-shim-runc-v2", "ctr", "runc", "registry", "cni/bridge", "cni/host-local", "cni/loopback", "cni/portmap",
}

// Tools are the folders of the repository's cache with the programs that a cluster consists of. They are real paths, so a cluster
// keeps what it was started with when others are built.
func Tools() ([]string, error) {
	cache, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	current := os.Getenv("HEARTH_TOOLS")
	if current == "" {
		current = filepath.Join(cache, "tools/current")
	}
	var out []string
	for _, set := range []struct{ dir, command string }{
		{current, "make tools"}, {filepath.Join(cache, "tools/kubernetes"), "make kubernetes"},
	} {
		dir, err := filepath.EvalSymlinks(set.dir)
		if err != nil {
			return nil, fmt.Errorf("programs of a cluster are not built: %w; `%s` builds them", err, set.command)
		}
		if dir, err = filepath.Abs(dir); err != nil {
			return nil, err
		}
		out = append(out, dir)
	}
	var missing []string
	for _, name := range needed {
		if _, err := os.Stat(Config{Tools: out}.tool(name)); err != nil {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("programs of a cluster are not built: %s; `make tools kubernetes` builds them", strings.Join(missing, ", "))
	}
	return out, nil
}

// tool is the path of a program, in the first folder that has it.
func (c Config) tool(name string) string {
	for _, dir := range c.Tools {
		if path := filepath.Join(dir, name); isFile(path) {
			return path
		}
	}
	return name
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir()
}

// cacheFolder is HEARTH_CACHE, or else the folder .cache of the repository in which the process runs.
func cacheFolder() (string, error) {
	if dir := os.Getenv("HEARTH_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if isFile(filepath.Join(dir, "go.mod")) {
			return filepath.Join(dir, ".cache"), nil
		}
		above := filepath.Dir(dir)
		if above == dir {
			return "", errors.New("this is not in Hearth's repository: name its cache in HEARTH_CACHE")
		}
		dir = above
	}
}

// Skip skips a test that needs a cluster where there can be none: without root, or without the programs.
func Skip(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a cluster needs root")
	}
	if _, err := Tools(); err != nil {
		t.Skip(err)
	}
}
