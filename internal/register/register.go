package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

const (
	defaultConfig = "/etc/containerd/config.toml"
	dropInName    = "hearth.toml"
)

// Exit codes of the commands, besides the daemon's own.
const (
	ExitRefused = 3 // nothing was changed; the error has the line to add
	ExitRestart = 4 // the files are as they should be, containerd has to be restarted by hand
)

// codedError is an error with an exit code.
type codedError struct {
	error
	code int
}

func (e codedError) ExitCode() int { return e.code }
func (e codedError) Unwrap() error { return e.error }

func refused(err error) error {
	var refusal *doctor.Refusal
	if errors.As(err, &refusal) {
		return codedError{fmt.Errorf("refused, nothing was changed: %w", err), ExitRefused}
	}
	return err
}

// Config says what to register, and where. Name, Address, Root, Containerd and State are required.
type Config struct {
	Name       string // of the proxy plugin
	Address    string // the snapshotter's socket
	Root       string // the snapshotter's folder
	Containerd string // its socket
	Main       string // containerd's configuration; empty: what the one that runs was told, or its default
	State      string // folder for what has to be known to undo it
	EditMain   bool   // an import may be added to the main file
	Restart    bool   // containerd may be restarted
	Purge      bool   // Undo unmounts and removes Root and Files too
	Files      string // nodeagent's folder of logs and of files for Instances; empty: none
	// RestartCommand is run by sh -c, with CONTAINERD_PID in its environment; empty: systemctl, if containerd is a service.
	RestartCommand string
	Wait           time.Duration // for containerd to be back
	Out            io.Writer     // one line for each thing that is done
}

// registrar is one run.
type registrar struct {
	Config
	running doctor.Containerd
	process *process // nil: containerd does not run
}

func (c Config) look(ctx context.Context) (*registrar, error) {
	for what, path := range map[string]string{"snapshotter socket": c.Address, "snapshotter root": c.Root, "state": c.State, "root": c.Files} {
		if what == "root" && path == "" {
			continue
		}
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return nil, fmt.Errorf("%s %q is not a clean absolute path", what, path)
		}
	}
	r := &registrar{Config: c, running: doctor.AskContainerd(ctx, c.Containerd, c.Name)}
	if r.running.Err == nil {
		var err error
		if r.process, err = find(r.running); err != nil {
			return nil, err
		}
		if err := r.process.enter(); err != nil {
			return nil, err
		}
		if r.Main == "" {
			r.Main = r.process.config()
		}
	}
	if r.Main == "" { // in a pod, the default would be a file of the pod
		return nil, fmt.Errorf("containerd does not answer at %s: %w; start it, or name its configuration with --containerd-config", c.Containerd, r.running.Err)
	}
	real, err := filepath.EvalSymlinks(r.Main) // a link stays a link
	if errors.Is(err, fs.ErrNotExist) {
		return nil, refused(&doctor.Refusal{Found: r.Main + " is not there", Meaning: "containerd goes by its built-in configuration, or by another file",
			Fix: &doctor.Fix{File: r.Main, Line: "version = 3", Do: "make the file with this line, or name another with --containerd-config"}})
	}
	if err != nil {
		return nil, fmt.Errorf("containerd's configuration: %w", err)
	}
	r.Main = real
	return r, nil
}

func (r *registrar) say(format string, args ...any) { _, _ = fmt.Fprintf(r.Out, format+"\n", args...) }

// plan is what is to be there.
type plan struct {
	path    string // of the drop-in
	text    []byte
	mark    string
	main    []byte // the main file as it is
	edited  []byte // as it shall be; nil: as it is
	added   string
	present bool // by hand: there is nothing to do
}

// Do registers. It changes nothing that is right already, and restarts containerd only if the one that runs has not read it.
func Do(ctx context.Context, c Config) error {
	r, err := c.look(ctx)
	if err != nil {
		return err
	}
	old, err := readRecord(r.State)
	if err != nil {
		return err
	}
	p, err := r.plan(old)
	if err != nil {
		return refused(err)
	}
	if p.present {
		r.say("%s knows the snapshotter %s already; it was not this program that told it", r.Main, r.Name)
		return r.restart(ctx, "")
	}
	if err := r.validate(ctx, p); err != nil {
		return refused(err)
	}
	if err := r.apply(old, p); err != nil {
		return err
	}
	return r.restart(ctx, p.mark)
}

// registration is what containerd shall know, in the words of its version.
func (r *registrar) registration() doctor.Registration {
	old := strings.HasPrefix(strings.TrimPrefix(r.running.Version, "v"), "2.0.")
	return doctor.Registration{Name: r.Name, Address: r.Address, Root: r.Root, OldPath: old}
}

// plan works out what is to be written, from the configuration as it is without us.
func (r *registrar) plan(old *record) (*plan, error) {
	if v := strings.TrimPrefix(r.running.Version, "v"); strings.HasPrefix(v, "1.") {
		return nil, &doctor.Refusal{Found: "containerd " + v, Meaning: "Hearth serves containerd 2.0 and later", Fix: &doctor.Fix{Do: "upgrade containerd"}}
	}
	without := ""
	if old != nil {
		without = old.DropIn.Path
	}
	config, err := doctor.LoadWithout(r.Main, without)
	if err != nil {
		return nil, err
	}
	want := r.registration()
	if _, there := config.Knows(r.Name); there && want.Missing(config) == nil {
		return &plan{present: true}, nil
	}
	p := &plan{}
	if p.text, p.mark, err = want.Text(config); err != nil {
		return nil, err
	}
	if p.main, err = readBounded(r.Main); err != nil {
		return nil, err
	}
	ok := false
	if p.path, ok = config.DropIn(dropInName); !ok {
		folder := filepath.Join(filepath.Dir(r.Main), "conf.d")
		p.path = filepath.Join(folder, dropInName)
		pattern := filepath.Join(folder, "*.toml")
		if p.edited, err = doctor.AddImport(p.main, pattern); err != nil || !r.EditMain {
			return nil, &doctor.Refusal{Found: r.Main + " imports no folder of drop-ins", Meaning: meaningOf(err),
				Fix: &doctor.Fix{File: r.Main, Line: "imports = ['" + pattern + "']", Do: "if it has imports, add this one to them; or let --edit-main do it"}}
		}
		p.added = difference(p.main, p.edited)
	}
	return p, r.foreign(old, p)
}

func meaningOf(err error) string {
	if err != nil {
		return "it cannot be edited: " + err.Error()
	}
	return "it is not edited without --edit-main"
}

// difference is what was put in between.
func difference(before, after []byte) string {
	at := 0
	for at < len(before) && before[at] == after[at] {
		at++
	}
	return string(after[at : at+len(after)-len(before)])
}

// foreign refuses to write over what somebody else has written.
func (r *registrar) foreign(old *record, p *plan) error {
	there, err := readBounded(p.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && bytes.Equal(there, p.text) {
		return nil
	}
	if err != nil {
		return err
	}
	if old != nil && old.DropIn.Path == p.path && old.DropIn.SHA256 == sum(there) {
		return nil
	}
	return &doctor.Refusal{Found: p.path + " is not as this program has written it", Meaning: "what somebody else has written is not overwritten",
		Fix: &doctor.Fix{Do: "move the changes to another file of that folder, and remove this one"}}
}

// validate reads the configuration as it would be: by our own eyes, and by those of the containerd that runs.
func (r *registrar) validate(ctx context.Context, p *plan) error {
	files := map[string][]byte{p.path: p.text}
	if p.edited != nil {
		files[r.Main] = p.edited
	}
	want := r.registration()
	by := "our own parser: containerd does not run"
	err := preview(files, func() error {
		config, err := doctor.Load(r.Main)
		if err != nil {
			return err
		}
		if !slices.Contains(config.Paths(), p.path) {
			return fmt.Errorf("%s would not be imported", p.path)
		}
		if err := want.Missing(config); err != nil {
			return err
		}
		if r.process == nil {
			return nil
		}
		if config, err = r.process.dump(ctx, r.Main); err != nil {
			return err
		}
		by = "containerd " + r.running.Version
		return want.Missing(config)
	})
	var impossible *errNoPreview
	if errors.As(err, &impossible) {
		by, err = "our own parser: "+impossible.Error(), nil
	}
	if err != nil {
		return fmt.Errorf("the configuration as it would be: %w", err)
	}
	r.say("the configuration with %s was read by %s: it is right", p.path, by)
	return nil
}

// apply writes what differs. The record comes first, so that whatever was written can be undone.
func (r *registrar) apply(old *record, p *plan) error {
	next := &record{Version: 1, DropIn: written{p.path, sum(p.text)}}
	if old != nil {
		next.Main, next.Folders, next.Times = old.Main, old.Folders, old.Times
		if old.DropIn.Path != p.path { // the imports lead elsewhere now
			if err := r.removeDropIn(old); err != nil {
				return err
			}
		}
	}
	if err := os.MkdirAll(r.State, 0o700); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	folder := filepath.Dir(p.path)
	for _, t := range timesOf(filepath.Dir(r.Main), filepath.Dir(folder), folder) {
		if !slices.ContainsFunc(next.Times, func(have folderT) bool { return have.Path == t.Path }) {
			next.Times = append(next.Times, t)
		}
	}
	for dir := folder; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		next.Folders = append([]string{dir}, next.Folders...)
	}
	if p.edited != nil {
		before, err := statOf(r.Main, p.main)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(r.State, originalName), p.main, 0o600); err != nil {
			return err
		}
		next.Main = &edit{written: written{r.Main, sum(p.edited)}, Added: p.added, Before: before}
	}
	if err := next.write(r.State); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	if there, err := readBounded(p.path); err != nil || !bytes.Equal(there, p.text) {
		if err := writeFile(p.path, p.text, 0o644); err != nil {
			return err
		}
		r.say("wrote %s", p.path)
	}
	if p.edited == nil {
		return nil
	}
	if err := next.Main.Before.replace(r.Main, p.edited); err != nil {
		return err
	}
	r.say("added to %s: %s", r.Main, strings.TrimSpace(p.added))
	return nil
}
