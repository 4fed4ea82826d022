package doctor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Bounds on what is read. containerd's own default configuration has 10 KiB.
const (
	maxFileBytes = 1 << 20
	maxFiles     = 256
	maxDepth     = 32
)

// Ids of the plugins that matter, as configurations from version 3 on spell them.
const (
	pluginImages   = "io.containerd.cri.v1.images"
	pluginRuntime  = "io.containerd.cri.v1.runtime"
	pluginCRI      = "io.containerd.grpc.v1.cri"
	pluginTransfer = "io.containerd.transfer.v1.local"
	pluginGRPC     = "io.containerd.server.v1.grpc"
)

// Config is containerd's configuration as containerd sees it: the file, then what it imports, each moved to the places that
// version 4 uses, later files over earlier ones.
type Config struct {
	// Path is the file that was read, "-" for a dump.
	Path string
	// Version is the first file's; 1 if it says none, as containerd takes it.
	Version int

	tree    map[string]any
	origins map[string]origin // of each value, by its path in tree
	files   []file
}

// file is one file of a configuration, as it was written.
type file struct {
	path    string
	version int
	tree    map[string]any
}

// origin says where a value was written.
type origin struct {
	path    string
	version int
}

// Load reads a configuration and what it imports. What containerd would refuse to start with is an error.
func Load(path string) (*Config, error) { return LoadWithout(path, "") }

// LoadWithout is Load as if one of the imported files were not there.
func LoadWithout(path, without string) (*Config, error) {
	c := &Config{Path: path, tree: map[string]any{}, origins: map[string]origin{}}
	for pending, seen := []string{path}, map[string]bool{}; len(pending) > 0; {
		path, pending = pending[0], pending[1:]
		if seen[path] || path == without {
			continue
		}
		seen[path] = true
		if len(seen) > maxFiles {
			return nil, fmt.Errorf("configuration %s imports more than %d files", c.Path, maxFiles)
		}
		data, err := readFile(path)
		if err != nil {
			return nil, err
		}
		if err := c.add(data, path); err != nil {
			return nil, err
		}
		imports, err := resolveImports(path, list(c.files[len(c.files)-1].tree["imports"]))
		if err != nil {
			return nil, fmt.Errorf("imports of %s: %w", path, err)
		}
		pending = append(pending, imports...)
	}
	return c, nil
}

// Parse reads what `containerd config dump` prints, in which all imports are merged already.
func Parse(r io.Reader) (*Config, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c := &Config{Path: "-", tree: map[string]any{}, origins: map[string]origin{}}
	return c, c.add(data, c.Path)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return data, nil
}

// add lays one file over what was read before.
func (c *Config) add(data []byte, path string) error {
	if len(data) > maxFileBytes {
		return fmt.Errorf("configuration %s is larger than %d bytes", path, maxFileBytes)
	}
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, column := at.Position()
			return fmt.Errorf("configuration %s: line %d, column %d: %w", path, row, column, err)
		}
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	if depth(tree) > maxDepth {
		return fmt.Errorf("configuration %s: tables are nested more than %d deep", path, maxDepth)
	}
	version, ok := tree["version"].(int64)
	if _, there := tree["version"]; there && (!ok || version < 0 || version > 4) {
		return fmt.Errorf("configuration %s: version %v is none that this doctor knows (1 to 4)", path, tree["version"])
	}
	f := file{path: path, version: max(1, int(version)), tree: tree}
	if len(c.files) == 0 {
		c.Version = f.version
	}
	c.files = append(c.files, f)
	c.merge(c.tree, migrate(f), "", origin{f.path, f.version})
	return nil
}

func depth(v any) int {
	deepest := 0
	switch v := v.(type) {
	case map[string]any:
		for _, child := range v {
			deepest = max(deepest, depth(child))
		}
	case []any:
		for _, child := range v {
			deepest = max(deepest, depth(child))
		}
	default:
		return 0
	}
	return deepest + 1
}

// resolveImports does as containerd: relative to the importing file, with * in any place.
func resolveImports(parent string, imports []string) ([]string, error) {
	var out []string
	for _, path := range imports {
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(parent), path)
		}
		if !strings.Contains(path, "*") {
			out = append(out, filepath.Clean(path))
			continue
		}
		matches, err := filepath.Glob(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, matches...)
	}
	return out, nil
}

// merge lays src over dst: tables by key, all else replaced, but top-level lists are united and a proxy plugin is replaced as a
// whole, as containerd does it.
func (c *Config) merge(dst, src map[string]any, prefix string, from origin) {
	for key, value := range src {
		path := join(prefix, key)
		table, isTable := value.(map[string]any)
		old, wasTable := dst[key].(map[string]any)
		switch {
		case isTable && wasTable && prefix != "proxy_plugins":
			c.merge(old, table, path, from)
		case isTable:
			fresh := map[string]any{}
			dst[key] = fresh
			c.merge(fresh, table, path, from)
		case prefix == "" && isList(value):
			dst[key] = unite(list(dst[key]), list(value))
			c.origins[path] = from
		default:
			dst[key] = value
			c.origins[path] = from
		}
		if isTable {
			c.origins[path] = from
		}
	}
}

func isList(v any) bool { _, ok := v.([]any); return ok }

func unite(a, b []string) []any {
	var out []any
	for i, s := range slices.Concat(a, b) {
		if i < len(a) || !slices.Contains(a, s) {
			out = append(out, s)
		}
	}
	return out
}

// join makes a path of keys. Plugin ids have dots, so dots do not separate.
func join(keys ...string) string { return strings.TrimPrefix(strings.Join(keys, "\x00"), "\x00") }

// get finds a value by its path.
func (c *Config) get(keys ...string) (any, bool) { return dig(c.tree, keys...) }

func dig(tree map[string]any, keys ...string) (any, bool) {
	var v any = tree
	for _, key := range keys {
		table, ok := v.(map[string]any)
		if !ok {
			return nil, false
		}
		if v, ok = table[key]; !ok {
			return nil, false
		}
	}
	return v, true
}

// text is a string value, or def if there is none.
func (c *Config) text(def string, keys ...string) string {
	v, _ := c.get(keys...)
	if s, ok := v.(string); ok {
		return s
	}
	return def
}

// flag is a boolean value, or def if there is none.
func (c *Config) flag(def bool, keys ...string) bool {
	v, _ := c.get(keys...)
	if b, ok := v.(bool); ok {
		return b
	}
	return def
}

// number is an integer value, or def if there is none.
func (c *Config) number(def int64, keys ...string) int64 {
	v, _ := c.get(keys...)
	if n, ok := v.(int64); ok {
		return n
	}
	return def
}

func (c *Config) table(keys ...string) map[string]any {
	v, _ := c.get(keys...)
	table, _ := v.(map[string]any)
	return table
}

// list is the strings of a list; what is no string in it is passed over.
func list(v any) []string {
	items, _ := v.([]any)
	var out []string
	for _, item := range items {
		if s, ok := item.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

// migrate moves what older versions keep elsewhere to where version 4 keeps it, as containerd 2.3 and later do when they read
// an older file. The tree itself is left as it is.
func migrate(f file) map[string]any {
	out := map[string]any{}
	for key, value := range f.tree {
		if key != "plugins" {
			out[key] = value
		}
	}
	plugins := map[string]any{}
	out["plugins"] = plugins
	written, _ := f.tree["plugins"].(map[string]any)
	for id, value := range written {
		if id == "cri" && f.version == 1 {
			id = pluginCRI
		}
		plugins[id] = value
	}
	if f.version >= 4 {
		return out
	}
	if cri, ok := plugins[pluginCRI].(map[string]any); ok {
		plugins[pluginImages] = imagesOf(cri, plugins[pluginImages])
		plugins[pluginRuntime] = runtimeOf(cri, plugins[pluginRuntime])
	}
	if address, ok := dig(f.tree, "grpc", "address"); ok && plugins[pluginGRPC] == nil {
		plugins[pluginGRPC] = map[string]any{"address": address}
	}
	delete(out, "grpc")
	return out
}

// imagesOf takes the settings of images from where version 2 has them.
func imagesOf(cri map[string]any, there any) map[string]any {
	out := copyOf(there)
	for _, key := range []string{"registry", "image_decryption", "max_concurrent_downloads", "image_pull_progress_timeout", "image_pull_with_sync_fs"} {
		take(out, cri, key)
	}
	if image, ok := cri["sandbox_image"]; ok {
		pinned := copyOf(out["pinned_images"])
		pinned["sandbox"] = image
		out["pinned_images"] = pinned
	}
	old, _ := cri["containerd"].(map[string]any)
	if _, ok := old["runtimes"]; !ok {
		return out // containerd 2 loses the rest then
	}
	for _, key := range moved {
		take(out, old, key)
	}
	return out
}

// moved are the settings of images that version 2 has among those of containers.
var moved = []string{"snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"}

// runtimeOf takes the settings of containers from where version 2 has them.
func runtimeOf(cri map[string]any, there any) map[string]any {
	out := copyOf(there)
	for _, key := range []string{"restrict_oom_score_adj", "cni"} {
		take(out, cri, key)
	}
	old, _ := cri["containerd"].(map[string]any)
	if old == nil {
		return out
	}
	containerd := copyOf(out["containerd"])
	for _, key := range []string{"default_runtime_name", "runtimes"} {
		take(containerd, old, key)
	}
	out["containerd"] = containerd
	return out
}

func take(to, from map[string]any, key string) {
	if v, ok := from[key]; ok {
		to[key] = v
	}
}

func copyOf(v any) map[string]any {
	out := map[string]any{}
	table, _ := v.(map[string]any)
	for key, value := range table {
		out[key] = value
	}
	return out
}
