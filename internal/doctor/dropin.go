package doctor

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Registration is what containerd has to know of Hearth's snapshotter where the CRI's own stays what it is: Hearth pulls its images
// for a runtime handler of the snapshotter's name, and everyone else's are pulled as before.
type Registration struct {
	Name    string // of the proxy plugin, and of the runtime handler
	Address string // the snapshotter's socket
	Root    string // the snapshotter's folder
	// OldPath: the CRI pulls by its older path, whatever the configuration says (containerd 2.0).
	OldPath bool
}

// ExportMark is the export of the proxy plugin that tells which drop-in a containerd that runs has read.
const ExportMark = "registration"

// Refusal is why a registration cannot be, and the line that would make it possible. It is a Finding as an error.
type Refusal Finding

// Error is the finding and its fix in one text.
func (r *Refusal) Error() string {
	text := r.Found
	if r.Meaning != "" {
		text += ": " + r.Meaning
	}
	if r.Fix != nil {
		text += "\n  " + r.Fix.String()
	}
	return text
}

func refuse(f *Fix, meaning, format string, args ...any) error {
	return &Refusal{Check: "registration", Status: Problem, Found: fmt.Sprintf(format, args...), Meaning: meaning, Fix: f}
}

// Paths are the first file and all that it imports, in the order in which containerd reads them.
func (c *Config) Paths() []string {
	paths := make([]string, len(c.files))
	for i, f := range c.files {
		paths[i] = f.path
	}
	return paths
}

// Knows says whether there is a proxy plugin of that name, and in which file.
func (c *Config) Knows(name string) (path string, ok bool) {
	if c.table("proxy_plugins", name) == nil {
		return "", false
	}
	return c.where("proxy_plugins", name, "type").path, true
}

// CRISnapshotter is the snapshotter that the CRI uses unless a runtime handler says otherwise, and the file that says so.
func (c *Config) CRISnapshotter() (name, path string) {
	at := []string{"plugins", pluginImages, "snapshotter"}
	return c.text("overlayfs", at...), c.where(at...).path
}

// DropIn is where a file of that name goes so that containerd reads it, as the first file's imports say.
func (c *Config) DropIn(name string) (path string, ok bool) {
	for _, pattern := range list(c.files[0].tree["imports"]) {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(c.files[0].path), pattern)
		}
		pattern = filepath.Clean(pattern)
		folder, names := filepath.Split(pattern)
		if strings.ContainsAny(folder, `*?[\`) || !strings.Contains(names, "*") {
			continue
		}
		if matches, err := filepath.Match(names, name); err == nil && matches {
			return filepath.Join(folder, name), true
		}
	}
	return "", false
}

// Text is the drop-in that lays the registration over a configuration which does not have it, and the mark that the proxy plugin
// exports. What the drop-in replaces as a whole, it repeats. A configuration that containerd would not pull by is refused.
func (r Registration) Text(c *Config) (text []byte, mark string, err error) {
	if err := r.possible(c); err != nil {
		return nil, "", err
	}
	images := map[string]any{"runtime_platforms": map[string]any{r.Name: map[string]any{"snapshotter": r.Name}}}
	if r.unnamed(c) {
		images["disable_snapshot_annotations"] = false
	}
	unpack, err := r.unpack(c)
	if err != nil {
		return nil, "", err
	}
	exports := map[string]any{"root": r.Root, "enable_remote_snapshot_annotations": "true", ExportMark: ""}
	tree := map[string]any{
		"version":       c.Version,
		"proxy_plugins": map[string]any{r.Name: map[string]any{"type": "snapshot", "address": r.Address, "exports": exports}},
		"plugins":       map[string]any{pluginImages: images, pluginTransfer: map[string]any{"unpack_config": unpack}},
	}
	if text, err = toml.Marshal(tree); err == nil {
		sum := sha256.Sum256(text)
		mark = hex.EncodeToString(sum[:8])
		exports[ExportMark] = mark
		text, err = toml.Marshal(tree)
	}
	if err != nil {
		return nil, "", fmt.Errorf("write drop-in: %w", err)
	}
	return slices.Concat([]byte(dropInHead), text), mark, nil
}

const dropInHead = `# Hearth's snapshotter, for the images of its functions; every other image is pulled as before. Made by "nodeagent register";
# "nodeagent unregister" removes it. unpack_config repeats what was there, because containerd replaces lists as a whole.
`

// possible refuses what no drop-in can mend.
func (r Registration) possible(c *Config) error {
	main := c.files[0].path
	if c.Version < 2 {
		return refuse(&Fix{File: main, Line: "version = 3"}, "containerd reads it in a way of 2019, in which a drop-in is not read as it is written",
			"%s says no version, or 1", main)
	}
	for _, id := range list(c.tree["disabled_plugins"]) {
		if slices.Contains([]string{"cri", pluginCRI, pluginImages, pluginRuntime, pluginTransfer}, id) {
			return refuse(c.remove("disabled_plugins"), "without it there are no pods", "disabled_plugins has %q", id)
		}
	}
	if path, there := c.Knows(r.Name); there {
		return refuse(&Fix{File: path, Table: heading("proxy_plugins", r.Name), Line: "# (remove it, or make it what docs/NODE.md says)"},
			"nodeagent does not take over what it did not make", "another file has %s, and it is not as nodeagent needs it", heading("proxy_plugins", r.Name))
	}
	return nil
}

// unnamed says whether the CRI would pull without naming layers to the snapshotter.
func (r Registration) unnamed(c *Config) bool {
	_, local := c.localPull()
	return (local || r.OldPath) && c.flag(true, "plugins", pluginImages, "disable_snapshot_annotations")
}

// unpack is what the Transfer service unpacks for: as before, and for the snapshotter.
func (r Registration) unpack(c *Config) ([]any, error) {
	at := []string{"plugins", pluginTransfer, "unpack_config"}
	platform := "linux/" + runtime.GOARCH
	written, there := c.get(at...)
	entries, _ := written.([]any)
	if !there {
		if used, path := c.CRISnapshotter(); used != "overlayfs" && used != r.Name {
			return nil, refuse(&Fix{File: path, Table: "[" + heading(at...) + "]", Line: fmt.Sprintf("platform = '%s', snapshotter = '%s', differ = …", platform, used)},
				"a drop-in takes the place of containerd's own default, which depends on its version", "the CRI's snapshotter is %s, and no unpack_config is written", used)
		}
		entries = []any{map[string]any{"platform": platform, "snapshotter": "overlayfs", "differ": "walking"}}
	}
	if slices.ContainsFunc(asTables(entries), func(entry map[string]any) bool { return entry["snapshotter"] == r.Name }) {
		return entries, nil
	}
	return append(slices.Clone(entries), map[string]any{"platform": platform, "snapshotter": r.Name, "differ": "walking"}), nil
}

// Missing says what keeps a configuration, with all that it imports, from having the registration; nil if it has it.
func (r Registration) Missing(c *Config) error {
	proxy := []string{"proxy_plugins", r.Name}
	key := func(keys ...string) []string { return append(slices.Clone(proxy), keys...) }
	want := []struct {
		value string
		keys  []string
	}{
		{"snapshot", key("type")},
		{r.Address, key("address")},
		{r.Root, key("exports", "root")},
		{"true", key("exports", "enable_remote_snapshot_annotations")},
		{r.Name, []string{"plugins", pluginImages, "runtime_platforms", r.Name, "snapshotter"}},
	}
	for _, w := range want {
		if got := strings.TrimPrefix(c.text("", w.keys...), "unix://"); got != w.value {
			return refuse(c.change("'"+w.value+"'", w.keys...), "images of functions are not pulled through Hearth",
				"%s has %s = %q", heading(w.keys[:len(w.keys)-1]...), w.keys[len(w.keys)-1], got)
		}
	}
	if slices.Contains(list(c.table(proxy...)["capabilities"]), "rebase") {
		return refuse(c.remove(key("capabilities")...), "containerd prepares layers without their parents then", "the snapshotter is said to have the capability rebase")
	}
	if r.unnamed(c) {
		return refuse(c.change("false", "plugins", pluginImages, "disable_snapshot_annotations"), "on the CRI's older path layers are not named to the snapshotter then",
			"disable_snapshot_annotations = true")
	}
	if _, local := c.localPull(); local || r.OldPath {
		return nil
	}
	for _, f := range c.checkTransfer(r.Name) {
		if f.Status == Problem {
			refusal := Refusal(f)
			return &refusal
		}
	}
	return nil
}

// AddImport adds a pattern to the imports of a configuration's text, and changes no other byte of it. It refuses what it cannot
// change so that containerd reads the rest as before.
func AddImport(text []byte, pattern string) ([]byte, error) {
	before, err := parseTree(text)
	if err != nil {
		return nil, err
	}
	quoted := "'" + pattern + "'"
	if strings.ContainsFunc(pattern, func(r rune) bool { return r == '\'' || r < ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("%q cannot be written as an import", pattern)
	}
	at, insert := 0, "imports = ["+quoted+"] # added by nodeagent register\n"
	if _, there := before["imports"]; there {
		var empty bool
		if at, empty, err = endOfImports(text); err != nil {
			return nil, err
		}
		insert = ", " + quoted
		if empty {
			insert = quoted
		}
	} else if bytes.HasPrefix(text, []byte("\ufeff")) {
		at = len("\ufeff")
	}
	out := slices.Concat(text[:at], []byte(insert), text[at:])
	after, err := parseTree(out)
	if err != nil {
		return nil, fmt.Errorf("add an import: %w", err)
	}
	want := maps.Clone(before)
	if want == nil {
		want = map[string]any{}
	}
	imports, _ := before["imports"].([]any)
	want["imports"] = append(slices.Clone(imports), pattern)
	if !reflect.DeepEqual(want, after) {
		return nil, errors.New("the imports are written in a way that cannot be added to")
	}
	return out, nil
}

// endOfImports is where another import can be written.
func endOfImports(text []byte) (at int, empty bool, err error) {
	var p unstable.Parser
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.KeyValue {
			break // a table begins
		}
		key := e.Key()
		if key.Next(); string(key.Node().Data) != "imports" || !key.IsLast() || e.Value().Kind != unstable.Array {
			continue
		}
		end := uint32(0)
		for items := e.Value().Children(); items.Next(); {
			if item := items.Node(); item.Kind != unstable.String || item.Raw.Length == 0 {
				return 0, false, errors.New("the imports hold something else than texts")
			} else {
				end = item.Raw.Offset + item.Raw.Length
			}
		}
		if end > 0 {
			return int(end), false, nil
		}
		from := int(key.Node().Raw.Offset + key.Node().Raw.Length)
		open := bytes.IndexByte(text[from:], '[')
		if open < 0 {
			return 0, false, errors.New("the imports have no beginning")
		}
		return from + open + 1, true, nil
	}
	if err := p.Error(); err != nil {
		return 0, false, err
	}
	return 0, false, errors.New("the imports are not at the top of the file")
}

func parseTree(text []byte) (map[string]any, error) {
	c := &Config{Path: "-", tree: map[string]any{}, origins: map[string]origin{}}
	if err := c.add(text, c.Path); err != nil {
		return nil, err
	}
	return c.files[0].tree, nil
}
