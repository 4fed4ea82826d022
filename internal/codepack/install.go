package codepack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	requirements = "requirements.txt"
	packageLock  = "package-lock.json"
	nodeModules  = "node_modules"

	maxRequirements = 1 << 20
	outputTail      = 4 << 10         // of an installer's output is kept for its error
	outputLines     = 15              // of them are shown
	killGrace       = 5 * time.Second // for what an installer has started
)

// Installer brings what code depends on into its package, by the language's own tool. That runs code of those who wrote the
// dependencies, as the user that deploys.
type Installer struct {
	// File names the dependencies.
	File string
	// Program installs them.
	Program string

	tree    *Tree
	aliases []string // of Program
	args    []string
	staged  []string // files that are copied to where it works; none: it works in the code's folder
	target  string   // flag for the folder to install into
	byHand  string   // what the user can do himself
}

// Installer says what has to be installed for a language: nothing (nil), if nothing is asked for or it is there.
func (t *Tree) Installer(language string) *Installer {
	if t.single {
		return nil
	}
	switch language {
	case Python:
		if t.wants(requirements) {
			return &Installer{
				File: requirements, Program: "pip", tree: t, aliases: []string{"pip3", "pip"}, target: "--target",
				args:   []string{"install", "--quiet", "--no-input", "--no-compile", "--disable-pip-version-check", "--requirement", requirements},
				byHand: "pip install --requirement requirements.txt --target " + t.path,
			}
		}
	case Node:
		if _, there := t.entries[nodeModules]; !there && t.wants(packageLock) {
			return &Installer{
				File: packageLock, Program: "npm", tree: t, aliases: []string{"npm"}, staged: []string{"package.json", packageLock, ".npmrc"},
				args: []string{"ci", "--omit=dev", "--no-audit", "--no-fund"}, byHand: "npm ci in " + t.path,
			}
		}
	}
	return nil
}

// wants says whether a file has more than blanks and comments.
func (t *Tree) wants(name string) bool {
	data, err := t.read(name)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) // the tool will say what is wrong
	}
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			return true
		}
	}
	return false
}

// read reads a small file of the code.
func (t *Tree) read(name string) ([]byte, error) {
	e, ok := t.entries[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	if e.kind == 0 && e.size > maxRequirements {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxRequirements)
	}
	return e.from.root.ReadFile(e.name)
}

// Install runs the tool and adds what it has installed to the Tree. Where both have a file, the code's own is taken.
func (i *Installer) Install(ctx context.Context) error {
	program, err := i.find()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "hearth-install-")
	if err != nil {
		return err
	}
	i.tree.temps = append(i.tree.temps, dir)
	work, args := i.tree.path, i.args
	if i.target != "" {
		args = append(args, i.target, dir)
	}
	if len(i.staged) > 0 {
		work = dir
		if err := i.stage(dir); err != nil {
			return fmt.Errorf("copy for %s: %w", i.Program, err)
		}
	}
	if err := run(ctx, program, args, work, append(os.Environ(), "PIP_ROOT_USER_ACTION=ignore", "NO_COLOR=1")); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s %s for %s/%s: %w\nInstall what it names yourself (%s), and say --no-deps", i.Program, i.args[0], i.tree.path, i.File, err, i.byHand)
	}
	if err := i.adopt(dir); err != nil {
		return fmt.Errorf("what %s has installed for %s: %w", i.Program, i.tree.path, err)
	}
	return nil
}

func (i *Installer) find() (string, error) {
	for _, name := range i.aliases {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s/%s names dependencies, and there is no %s here: install it, or bring them into %s yourself (%s) and say --no-deps",
		i.tree.path, i.File, i.Program, i.tree.path, i.byHand)
}

// stage copies what the tool reads into a folder of its own, so that it leaves the code's alone.
func (i *Installer) stage(dir string) error {
	for _, name := range i.staged {
		data, err := i.tree.sources[0].root.ReadFile(name) // even if it is left out of the package
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// adopt adds what was installed, without what was staged.
func (i *Installer) adopt(dir string) error {
	for _, name := range i.staged {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	from, err := i.tree.source(dir, "what "+i.Program+" has installed")
	if err != nil {
		return err
	}
	if err := i.tree.walk(from, nil); err != nil {
		return err
	}
	return i.tree.checkLinks()
}

// run runs a program to its end, or ends it with all that it has started. Its output is for its error.
func run(ctx context.Context, program string, args []string, dir string, env []string) error {
	var output tail
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &output, &output
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killGrace
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w\n%s", err, output.lines(outputLines))
	}
	return nil
}

// tail keeps the end of what is written to it. It is written to by one goroutine: both outputs are one.
type tail struct{ kept []byte }

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p[max(0, len(p)-outputTail):]...)
	t.kept = t.kept[max(0, len(t.kept)-outputTail):]
	return len(p), nil
}

// lines are the last ones, indented.
func (t *tail) lines(most int) string {
	all := bytes.Split(bytes.TrimSpace(t.kept), []byte("\n"))
	var b strings.Builder
	for _, line := range all[max(0, len(all)-most):] {
		fmt.Fprintf(&b, "  %s\n", bytes.TrimRight(line, "\r"))
	}
	return strings.TrimRight(b.String(), "\n")
}
