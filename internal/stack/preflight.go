package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/hearth-serverless/hearth/internal/host"
)

// preflight says all that stands in the way of a deployment, each with what to do about it.
func (c Config) preflight(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("a deployment makes containers, mounts and network namespaces, which only root may: run it with sudo")
	}
	return errors.Join(c.checkTools(), checkKernel("/proc/filesystems", "/proc/self/mountinfo"), c.checkAddresses(ctx))
}

func (c Config) checkTools() error {
	if c.Tools == "" {
		return errors.New("no folder of tools (containerd, runc, …) was named: `make tools` compiles them into .cache/tools/current; name it with --tools or HEARTH_TOOLS")
	}
	tools := []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "cni/ptp", "cni/host-local", "cni/loopback"}
	if c.Registry {
		tools = append(tools, "registry")
	}
	missing := missingPrograms(c.Tools, tools)
	var problems []error
	if len(missing) > 0 {
		problems = append(problems, fmt.Errorf("tools in %s: there is no %s; `make tools` compiles them into .cache/tools/current, name their folder with --tools", c.Tools, strings.Join(missing, ", ")))
	}
	own := []string{nameNodeagent, "launcher", "logwriter", namePoolmanager, nameGateway}
	if c.Sidecar {
		own = append(own, sidecarProgram)
	}
	if missing := missingPrograms(c.Bin, own); len(missing) > 0 {
		problems = append(problems, fmt.Errorf("hearth's daemons in %s: there is no %s; `make build` compiles them into bin, name their folder with --bin", c.Bin, strings.Join(missing, ", ")))
	}
	if _, err := os.Stat(c.PauseImage); err != nil {
		problems = append(problems, fmt.Errorf("pause image: %w; `make build` makes it, name the file with --pause-image", err))
	}
	return errors.Join(problems...)
}

func missingPrograms(dir string, names []string) []string {
	var missing []string
	for _, name := range names {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.IsDir() || info.Mode().Perm()&0o111 == 0 {
			missing = append(missing, name)
		}
	}
	return missing
}

func checkKernel(filesystems, mountinfo string) error {
	known, err := os.ReadFile(filesystems)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	var problems []error
	if !strings.Contains(string(known), "\toverlay\n") {
		problems = append(problems, errors.New("kernel: no overlayfs, which images are mounted with: try `modprobe overlay`"))
	}
	mounts, err := host.Mounts(mountinfo)
	if err != nil {
		return err
	}
	if len(host.CgroupMounts(mounts)) == 0 {
		problems = append(problems, errors.New("kernel: no cgroups are mounted, which Instances are held in: `mount -t cgroup2 none /sys/fs/cgroup`"))
	}
	return errors.Join(problems...)
}

func (c Config) checkAddresses(ctx context.Context) error {
	problems := []error{checkFree(ctx, "gateway", c.GatewayAddress)}
	if c.Registry {
		problems = append(problems, checkFree(ctx, "registry", c.RegistryAddress))
	}
	return errors.Join(problems...)
}

func checkFree(ctx context.Context, what, address string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("%s address %s: %w; choose another with --%s-address", what, address, err, what)
	}
	return l.Close()
}
