package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

// dumpTimeout bounds how long containerd may take to print its configuration.
const dumpTimeout = time.Minute

// preview calls look where the given files have the given contents, and nobody else sees them: in a mount namespace of its own, with
// an overlay over their folders. Nothing on the disk is changed.
func preview(files map[string][]byte, look func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespace with it
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return &errNoPreview{fmt.Errorf("mount namespace: %w", err)}
			}
			if err := cover(files); err != nil {
				return &errNoPreview{err}
			}
			return look()
		}()
	}()
	return <-done
}

// errNoPreview says that this machine has no way to look at files that are not there yet.
type errNoPreview struct{ err error }

func (e *errNoPreview) Error() string {
	return "try the files before they are written: " + e.err.Error()
}
func (e *errNoPreview) Unwrap() error { return e.err }

// cover lays the files over what is there.
func cover(files map[string][]byte) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	work, err := os.MkdirTemp("", "hearth-register-")
	if err != nil {
		return err
	}
	defer os.Remove(work) // the folder; what is in it is in memory, in this namespace
	if err := unix.Mount("hearth", work, "tmpfs", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	defer func() { _ = unix.Unmount(work, unix.MNT_DETACH) }()
	uppers := map[string]string{} // by the folder that is covered
	for _, path := range slices.SortedFunc(maps.Keys(files), func(a, b string) int { return strings.Count(a, "/") - strings.Count(b, "/") }) {
		text, base := files[path], ancestor(filepath.Dir(path))
		if base == "/" || strings.ContainsAny(base, ",:\\") {
			return fmt.Errorf("no overlay can be over %s", base)
		}
		for covered := range uppers { // one for a folder and those below it
			if strings.HasPrefix(base+"/", covered+"/") {
				base = covered
			}
		}
		if uppers[base] == "" {
			uppers[base] = filepath.Join(work, fmt.Sprint(len(uppers)))
		}
		upper := filepath.Join(uppers[base], "upper", strings.TrimPrefix(path, base))
		if err := errors.Join(os.MkdirAll(filepath.Join(uppers[base], "work"), 0o755), os.MkdirAll(filepath.Dir(upper), 0o755),
			os.WriteFile(upper, text, 0o644)); err != nil {
			return err
		}
	}
	for base, dir := range uppers {
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", base, dir, dir)
		if err := unix.Mount("overlay", base, "overlay", 0, options); err != nil {
			return fmt.Errorf("mount an overlay over %s: %w", base, err)
		}
	}
	return nil
}

// ancestor is the nearest folder that exists, with no links in its path.
func ancestor(dir string) string {
	for {
		if real, err := filepath.EvalSymlinks(dir); err == nil && real == dir {
			return dir
		}
		if dir == "/" || dir == "." {
			return "/"
		}
		dir = filepath.Dir(dir)
	}
}

// dump is the configuration as a containerd binary reads it.
func (p *process) dump(ctx context.Context, config string) (*doctor.Config, error) {
	ctx, cancel := context.WithTimeout(ctx, dumpTimeout)
	defer cancel()
	var out, says bytes.Buffer
	cmd := exec.CommandContext(ctx, p.exe, "--config", config, "config", "dump")
	cmd.Args[0] = p.name
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &says, os.Environ()
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("containerd config dump: %w: %s", err, lastLine(says.String()))
	}
	return doctor.Parse(&out)
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
