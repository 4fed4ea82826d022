package register

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/cripull"
	"github.com/hearth-serverless/hearth/internal/daemon"
)

const long = `It acts in the mount namespace of the containerd that answers at --containerd-socket, so that all paths are that one's, and is run as
root on the node or in a privileged pod with hostPID. Exit codes: 0 done, 1 failed, 2 usage, 3 refused (nothing was changed; the
message has the line to add), 4 the files are right but containerd has to be restarted by hand.`

// Commands are register and unregister, of nodeagent.
func Commands() []daemon.Command {
	c := Config{Name: cripull.Handler}
	return []daemon.Command{
		{
			Name: "register", Short: "tell this node's containerd of Hearth's snapshotter",
			Long: "register writes a drop-in of containerd's configuration, having had containerd read it first, and restarts containerd if the one\n" +
				"that runs has not read it. It may be run any number of times.\n\n" + long,
			Flags: c.flags,
			Run:   func(ctx context.Context, out io.Writer) error { c.Out = out; return Do(ctx, c) },
		},
		{
			Name: "unregister", Short: "give this node's containerd back its configuration, byte for byte",
			Long: "unregister undoes what register has done, and restarts containerd. Run it when nodeagent and its instances are gone from the node.\n\n" + long,
			Flags: func(f *pflag.FlagSet) {
				c.flags(f)
				f.BoolVar(&c.Purge, "purge", false, "unmount and remove the snapshotter's root and nodeagent's too")
				f.StringVar(&c.Files, "root", "/var/lib/hearth/node", "nodeagent's folder of logs and of files for instances, with --purge")
			},
			Run: func(ctx context.Context, out io.Writer) error { c.Out = out; return Undo(ctx, c) },
		},
	}
}

func (c *Config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.Containerd, "containerd-socket", "/run/containerd/containerd.sock", "containerd's socket, here and on the node")
	f.StringVar(&c.Main, "containerd-config", "", "containerd's configuration (default: what the one that runs was started with, or "+defaultConfig+")")
	f.StringVar(&c.Address, "snapshotter-socket", "/run/hearth/snapshotter.sock", "Unix socket that nodeagent serves the snapshotter on")
	f.StringVar(&c.Root, "snapshotter-root", "/var/lib/hearth/snapshotter", "folder of layers and snapshots")
	f.StringVar(&c.State, "state", "/var/lib/hearth/register", "folder for what has to be known to undo it")
	f.BoolVar(&c.EditMain, "edit-main", false, "add an import to containerd's main file if it has none that fits")
	f.BoolVar(&c.Restart, "restart", true, "restart containerd if it has to be; otherwise end with 4")
	f.StringVar(&c.RestartCommand, "restart-command", "", "shell command that restarts containerd, whose pid is in CONTAINERD_PID (default: systemctl restart of its unit)")
	f.DurationVar(&c.Wait, "wait", 2*time.Minute, "how long containerd may take to be back")
}

// purge removes the snapshotter's root and nodeagent's, with all that is mounted below them.
func (c Config) purge() error {
	for _, dir := range []string{c.Root, c.Files} {
		if dir == "" {
			continue
		}
		if err := c.removeMounted(dir); err != nil {
			return err
		}
	}
	return nil
}

func (c Config) removeMounted(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	points := mountsBelow(string(table), real)
	for _, point := range points {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	if err := os.RemoveAll(real); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(c.Out, "removed %s, with %d mounts\n", real, len(points))
	return nil
}

// mountsBelow are the mount points below a folder, the innermost first.
func mountsBelow(table, dir string) (points []string) {
	for line := range strings.Lines(table) {
		if fields := strings.Fields(line); len(fields) > 4 {
			if point := unescape(fields[4]); strings.HasPrefix(point, dir+"/") {
				points = append(points, point)
			}
		}
	}
	slices.Reverse(points)
	return points
}

// unescape undoes the kernel's \040 for a space, and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
