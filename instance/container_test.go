package instance_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/instance"
)

// TestHelperContainer is no test: in a mount namespace of its own it makes what runc makes of a launcher's container, as far as
// mounts go, and executes the launcher.
func TestHelperContainer(t *testing.T) {
	root := os.Getenv("HEARTH_TEST_ROOT")
	if root == "" {
		t.Skip("run by TestContainer")
	}
	const bind = unix.MS_BIND
	err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount(root, root, "", bind, ""))
	err = errors.Join(err, unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""))
	for _, dir := range []string{"dev", "sys", "run", "tmp", "var/tmp"} {
		err = errors.Join(err, unix.Mount("tmpfs", filepath.Join(root, dir), "tmpfs", 0, ""))
	}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		file := filepath.Join(root, "etc", name)
		err = errors.Join(err, unix.Mount(file, file, "", bind, ""))
	}
	err = errors.Join(err, unix.Mount(os.Getenv("HEARTH_TEST_CONTROL"), filepath.Join(root, "control"), "", bind, ""),
		unix.Chdir(root), unix.PivotRoot(".", "."), unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/"))
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(unix.Exec("/launcher", []string{"/launcher", "/control/launch.sock"}, nil))
}

// mountsLoader is a loader that answers with what it finds of its Function's.
const mountsLoader = `package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
)

func main() {
	listener, err := net.FileListener(os.Stdin)
	if err != nil {
		panic(err)
	}
	conn, err := listener.Accept()
	if err != nil {
		panic(err)
	}
	conn.Write([]byte("{\"ready\":{\"protocol\":1}}\n"))
	var question json.RawMessage
	if err := json.NewDecoder(conn).Decode(&question); err != nil {
		panic(err)
	}
	trace := ""
	for _, path := range []string{"/workspace/main", "/run/secrets/key", "/control/launch.sock"} {
		text, err := os.ReadFile(path)
		if err != nil {
			text = []byte(err.Error())
		}
		if os.WriteFile(path, []byte("x"), 0o600) == nil {
			text = append(text, ", can be written to"...)
		}
		trace += string(text) + "|"
	}
	for _, path := range []string{"/new", "/workspace/new", "/etc/new", "/var/tmp/new"} {
		trace += fmt.Sprint(os.WriteFile(path, []byte("x"), 0o600), "|")
	}
	written, err := 0, error(nil)
	for f, _ := os.Create("/tmp/fill"); err == nil; written++ {
		_, err = f.Write(make([]byte, 1<<20))
	}
	dir, _ := os.Getwd()
	trace += fmt.Sprint(written, " ", err, "|", dir)
	status, _ := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "Cap") {
			trace += "|" + line
		}
	}
	json.NewEncoder(conn).Encode(map[string]any{"failed": map[string]string{"error": "no fault", "trace": trace}})
}
`

// compile makes a static program of one file, which uses the standard library alone.
func compile(t *testing.T, program, source string) {
	t.Helper()
	build := exec.Command("go", "build", "-o", program, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GO111MODULE=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestContainer has a real launcher become a loader in mount namespaces of its own, without a containerd, and mounts code and
// secrets into them while it runs.
func TestContainer(t *testing.T) {
	if os.Geteuid() != 0 { // the one probe: as root nothing skips
		t.Skip("mounting wants root")
	}
	top := t.TempDir()
	if err := mount.All([]mount.Mount{{Type: "tmpfs", Source: "tmpfs"}}, top); err != nil { // overlay on overlay is refused
		t.Fatal(err)
	}
	defer func() {
		if err := mount.UnmountAll(top, 0); err != nil {
			t.Error(err)
		}
	}()
	launcher := filepath.Join(t.TempDir(), "launcher")
	compile(t, launcher, "../runtimes/launcher/main.go")
	root, err := instance.WriteLauncherRoot(top, launcher)
	if err != nil {
		t.Fatal(err)
	}
	control := filepath.Join(top, "control")
	for _, dir := range []string{"control", "upper", "work", "scratch", "lower/bin", "code"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(top, "code", "main"), []byte("code"), 0o644); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(source, []byte(mountsLoader), 0o644); err != nil {
		t.Fatal(err)
	}
	compile(t, filepath.Join(top, "lower", "bin", "loader"), source)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	container := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestHelperContainer$")
	container.Env = append(os.Environ(), "HEARTH_TEST_ROOT="+root, "HEARTH_TEST_CONTROL="+control)
	container.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	container.Stdout, container.Stderr = t.Output(), t.Output()
	if err := container.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = container.Wait()
	}()
	l, err := instance.AwaitLauncher(ctx, uint32(container.Process.Pid), control)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	prepared, err := instance.Detach([]mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + filepath.Join(top, "lower"), "upperdir=" + filepath.Join(top, "upper"), "workdir=" + filepath.Join(top, "work"),
	}}}, filepath.Join(top, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer prepared.Close()
	err = l.Launch(ctx, instance.Launch{Root: prepared, Loader: true, Process: &specs.Process{
		Args: []string{"/bin/loader"}, Cwd: "/srv/of/the/image",
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.LimitTmp(2 << 20); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	told := instance.NewLoader(conn, nil)
	defer told.Close()
	if _, err := told.Greet(ctx); err != nil {
		t.Fatal(err)
	}
	mountInto(t, ctx, l, top)
	showElsewhere(t, uint32(container.Process.Pid))
	_, _, err = told.Load(ctx, instance.LoadQuestion{})
	const none = "0000000000000000"
	want := "no fault\ncode|hush|open /control/launch.sock: no such file or directory|" +
		"open /new: read-only file system|open /workspace/new: read-only file system|open /etc/new: read-only file system|<nil>|" +
		"3 write /tmp/fill: no space left on device|/srv/of/the/image|" +
		"CapInh:\t" + none + "|CapPrm:\t" + none + "|CapEff:\t" + none + "|CapBnd:\t" + none + "|CapAmb:\t" + none
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// showElsewhere has who enters another container's mounts see those of a Function's, and checks what it sees.
func showElsewhere(t *testing.T, function uint32) {
	t.Helper()
	holder := exec.Command("sleep", "3600")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	pid := uint32(holder.Process.Pid)
	defer func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	}()
	look := func(path, want string) {
		t.Helper()
		var got []byte
		err := instance.InMountsOf(pid, func() (err error) {
			got, err = os.ReadFile(path)
			return err
		})
		if err != nil {
			got = []byte(err.Error())
		}
		if !strings.Contains(string(got), want) {
			t.Errorf("%s is %.80q, want %q", path, got, want)
		}
	}
	private := func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") } // as a container's are
	if err := instance.InMountsOf(pid, private); err != nil {
		t.Fatal(err)
	}
	if err := instance.ShowTree(function, pid); err != nil {
		t.Fatal(err)
	}
	if err := instance.ShowTree(function, pid); err == nil {
		t.Error("it is shown twice")
	}
	look("/workspace/main", "code")
	look("/run/secrets/key", "hush")
	look("/bin/loader", "ELF")
	look("/proc/self/status", "Name:")
	write := func() error { return os.WriteFile("/tmp/new", nil, 0o600) }
	if err := instance.InMountsOf(pid, write); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to what is shown: %v", err)
	}
	if err := errors.Join(instance.HideTree(pid), instance.HideTree(pid)); err != nil {
		t.Error(err)
	}
	look("/workspace/main", "no such file")
	look("/proc/self/status", "Name:")
}

// mountInto mounts code and secrets.
func mountInto(t *testing.T, ctx context.Context, l instance.Launcher, top string) {
	t.Helper()
	view, err := instance.NewView([]mount.Mount{{Type: "bind", Source: filepath.Join(top, "code")}}, filepath.Join(top, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	code, err := view.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer code.Close()
	secrets, err := instance.SecretsTree(map[string][]byte{"key": []byte("hush")})
	if err != nil {
		t.Fatal(err)
	}
	defer secrets.Close()
	if err := l.Mount(ctx, instance.Attachment{Path: "/workspace", Tree: code}, instance.Attachment{Path: "/run/secrets", Tree: secrets}); err != nil {
		t.Fatal(err)
	}
}
