package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Revision is an immutable version of a Function: all that a node needs to start an Instance of it. Hearth makes one whenever a Function
// changes in what its Instances notice, and owns it: there is nothing to do with one but to read it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=rev,categories=hearth
// +kubebuilder:printcolumn:name="Function",type=string,JSONPath=`.spec.function`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Image",type=string,priority=1,JSONPath=`.status.image`
// +kubebuilder:printcolumn:name="Runtime",type=string,JSONPath=`.spec.runtime`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')",message="metadata.name: must be a DNS label, as Hearth names it: FUNCTION-NNNNN"
type Revision struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`
	// Spec of the version. It never changes.
	// +required
	Spec RevisionSpec `json:"spec"`
	// Status is what became known since.
	// +optional
	Status RevisionStatus `json:"status,omitempty"`
}

// RevisionSpec is all that a node needs to start an Instance.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a revision never changes; change the function, which makes a new one"
// +kubebuilder:validation:XValidation:rule="has(self.image) != has(self.runtime)",message="a revision is either an image, or a runtime with code"
// +kubebuilder:validation:XValidation:rule="has(self.runtime) == has(self.code)",message="runtime and code belong together"
type RevisionSpec struct {
	// Function that this is a version of.
	// +required
	// +kubebuilder:validation:MinLength=1
	Function Name `json:"function"`
	// Image as the Function has it; status.image has the digest.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image,omitempty"`
	// Runtime by name, in which the code runs.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Runtime Name `json:"runtime,omitempty"`
	// Code that runs in the runtime.
	// +optional
	Code *Code `json:"code,omitempty"`
	// Port where the process listens. In a group the node chooses it.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port,omitempty"`
	// Env is the process's environment.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	Env []EnvVar `json:"env,omitempty"`
	// Command replaces the image's entrypoint.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=1000
	Command []Word `json:"command,omitempty"`
	// Args replace the image's command.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=1000
	Args []Word `json:"args,omitempty"`
	// Resources that an Instance may use.
	// +optional
	Resources Resources `json:"resources,omitzero"`
	// Concurrency is how many requests one Instance serves at once, a hard limit.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Concurrency int32 `json:"concurrency,omitempty"`
	// SecretName names the Secret of this namespace that has the files of /run/secrets as they were when the Revision was made, each
	// under its name. The Revision owns it.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	SecretName string `json:"secretName,omitempty"`
	// Tenant whose Function it is of.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Tenant Name `json:"tenant,omitempty"`
	// Group whose Functions share pods.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Group Name `json:"group,omitempty"`
	// WritableRoot lets the process write to its root file system.
	// +optional
	WritableRoot bool `json:"writableRoot,omitempty"`
}

// RevisionStatus is what became known of a Revision since it was made.
type RevisionStatus struct {
	// Conditions: Ready (its bytes are resolved to a digest, so that all Instances run the same).
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Image by digest, once a node has resolved it.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image,omitempty"`
}

// RevisionList is what the API server answers to a list.
//
// +kubebuilder:object:root=true
type RevisionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Revision `json:"items"`
}
