package daemon

import (
	"runtime/debug"
	"strings"
)

// version is set by the linker (see the Makefile); empty in a plain go build.
var version string //nolint:gochecknoglobals // the linker writes nothing else

// Version says which Hearth this is: what the linker was told, else the module version or commit that Go recorded, else
// "dev".
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "dev"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	return commit(info.Settings)
}

func commit(settings []debug.BuildSetting) string {
	var revision, dirty string
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if revision == "" {
		return "dev"
	}
	return strings.Join([]string{"dev-", revision, dirty}, "")
}
