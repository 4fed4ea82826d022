package instance

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// oomScore makes a Function's process a likelier victim of the kernel than the shim and the daemons. It only ever raises the
// score, which needs no privilege.
const oomScore = 500

// capabilities are what the launcher needs to become an image's user: to give it its output, to change user and groups, and to
// empty the bounding set. What it executes has none (runtimes/launcher).
var capabilities = []string{"CAP_CHOWN", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP"}

// spec describes an Instance's container as it is made, with the launcher in it: the pod's network, IPC and host name,
// everything else its own, and the restrictions that the CRI gives an ordinary container, plus no new privileges, fewer
// capabilities, and bounds for processes and memory. The Function's process inherits them all, and loses the capabilities. What it
// can write to is in memory, and counts as its own.
func (e *Engine) spec(ctx context.Context, i *instance, box sandbox) (*specs.Spec, error) {
	// containerd's own defaults: capabilities, mounts, masked and read-only paths, devices. They depend on nothing but the name.
	ctx = namespaces.WithNamespace(ctx, e.cfg.Namespace)
	s, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: containerID(i.id)})
	if err != nil {
		return nil, fmt.Errorf("spec of instance %s: %w", i.id, err)
	}
	score := oomScore
	s.Root = &specs.Root{Path: e.launcherRoot, Readonly: true}
	s.Process.Args = []string{launcherProgram, launcherControl + "/" + launcherSocket}
	s.Process.Env = []string{"GOMAXPROCS=1"} // it only waits
	s.Process.Cwd = "/"
	s.Process.NoNewPrivileges = true
	s.Process.OOMScoreAdj = &score
	s.Process.Rlimits = nil // the shim's, as with the CRI
	s.Mounts = append(s.Mounts, e.mounts(i.id)...)
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities}
	s.Linux.CgroupsPath = runcPath(e.cgroups.function(i.place()))
	s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &e.cfg.PidsLimit}
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &e.cfg.MemoryBytes}
	if e.cgroups.swaps() {
		both := 2 * e.cfg.MemoryBytes // as runc wants it: memory and swap; so that a hog does not take all of the node's swap
		s.Linux.Resources.Memory.Swap = &both
	}
	s.Linux.Namespaces = []specs.LinuxNamespace{
		{Type: specs.PIDNamespace},
		{Type: specs.MountNamespace},
		{Type: specs.NetworkNamespace, Path: namespacePath(box.Pid, "net")},
		{Type: specs.IPCNamespace, Path: namespacePath(box.Pid, "ipc")},
		{Type: specs.UTSNamespace, Path: namespacePath(box.Pid, "uts")},
	}
	if e.cgroups.unified() {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	s.Linux.Seccomp = seccompProfile(s)
	return s, nil
}

// functionProcess is what the launcher becomes.
func functionProcess(host string, img *image, user specs.User, r *hearthv1.Revision) (*specs.Process, error) {
	args, err := command(img.Config, r)
	if err != nil {
		return nil, err
	}
	port := map[string]string{"PORT": strconv.Itoa(int(r.Port))} // the engine waits on this one, whatever else is said
	return &specs.Process{
		Args: args, Env: environment(img.Config.Env, host, r.Env, port), Cwd: workdir(img.Config.WorkingDir), User: user,
	}, nil
}

// loaderProcess is what the launcher becomes for a Runtime.
func loaderProcess(host string, img *image, user specs.User, rt *hearthv1.Runtime) (*specs.Process, error) {
	args := slices.Concat(img.Config.Entrypoint, img.Config.Cmd)
	if len(args) == 0 {
		return nil, invalid("image of runtime %s has no entrypoint", rt.Name)
	}
	preload := map[string]string{"HEARTH_PRELOAD": strings.Join(rt.Preload, ",")}
	return &specs.Process{
		Args: args, Env: environment(img.Config.Env, host, rt.Env, preload), Cwd: workdir(img.Config.WorkingDir), User: user,
	}, nil
}

// become describes in a container's spec the process that its launcher has become.
func become(to, p *specs.Process) {
	to.Args, to.Env, to.Cwd, to.User, to.Capabilities = p.Args, p.Env, p.Cwd, p.User, &specs.LinuxCapabilities{}
}

// command is what the container runs, by the rules of Kubernetes: a command replaces both the image's entrypoint and its
// arguments, arguments replace the image's arguments only.
func command(img ocispec.ImageConfig, r *hearthv1.Revision) ([]string, error) {
	args := slices.Concat(r.Command, r.Args)
	switch {
	case len(r.Command) > 0:
	case len(r.Args) > 0:
		args = slices.Concat(img.Entrypoint, r.Args)
	default:
		args = slices.Concat(img.Entrypoint, img.Cmd)
	}
	if len(args) == 0 {
		return nil, invalid("image of %s has no entrypoint and the function names no command", r.Function)
	}
	return args, nil
}

// environment is the image's, then what Hearth says, then what else is given, later ones winning.
func environment(img []string, host string, more ...map[string]string) []string {
	env := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
	for _, entry := range img {
		if k, v, ok := strings.Cut(entry, "="); ok && k != "" {
			env[k] = v
		}
	}
	env["HOSTNAME"] = host
	for _, m := range more {
		maps.Copy(env, m)
	}
	list := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		list = append(list, k+"="+env[k])
	}
	return list
}

func workdir(img string) string {
	if !filepath.IsAbs(img) {
		return "/" + img
	}
	return filepath.Clean(img)
}

// mounts are the Instance's own files, the launcher's socket, and the container's view of its cgroup, from which a JVM for
// example learns its limits.
func (e *Engine) mounts(id string) []specs.Mount {
	list := []specs.Mount{{
		Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
		Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"},
	}, {
		Destination: launcherControl, Type: "bind", Source: e.controlOf(id), Options: []string{"bind", "rprivate", "rw"},
	}}
	for _, name := range []string{fileHosts, fileHostname, fileResolvConf} {
		list = append(list, specs.Mount{
			Destination: "/etc/" + name, Type: "bind", Source: filepath.Join(e.filesOf(id), name),
			Options: []string{"rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"}, // they are on the node's disk
		})
	}
	return append(list, tmpfs("/tmp", writableBytes(e.cfg.MemoryBytes)), tmpfs("/var/tmp", smallTmpfs))
}

// smallTmpfs is what each of /run, /dev, /dev/shm and /var/tmp takes.
const smallTmpfs = 64 << 20

// writableBytes is what /tmp takes of a memory limit, and a writable root: all that is written there is memory, and a Function that
// has filled one of them is told so while there is memory left, instead of being killed.
func writableBytes(memory int64) int64 { return memory / 2 }

// tmpfs is a file system in memory, for all users, from which programs may be run: runtimes unpack libraries there.
func tmpfs(path string, bytes int64) specs.Mount {
	return specs.Mount{
		Destination: path, Type: "tmpfs", Source: "tmpfs",
		Options: []string{"nosuid", "nodev", "mode=1777", "size=" + strconv.FormatInt(bytes, 10)},
	}
}

// seccompProfile is containerd's default one for the native system calls alone. Its filter for those of 32-bit programs, which no
// image that we start has, takes runc 25 ms to compile: a third of its work. They are killed instead.
func seccompProfile(s *specs.Spec) *specs.LinuxSeccomp {
	p := seccomp.DefaultProfile(s)
	native := map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}[runtime.GOARCH]
	if native != "" {
		p.Architectures = []specs.Arch{native}
	}
	return p
}
